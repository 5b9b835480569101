"""One administrative call: who acts, on which organization, and what they may give to others.

Endpoints are plain functions, which FastAPI runs in threads, because they wait for SQL. What `accounts` change is recorded as the
caller's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from fastapi import Depends, Path, Query
from pydantic import AfterValidator
from starlette.requests import Request

from cluster.errors import Forbidden, NotFound
from cluster.tenancy import permissions
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.chain import Actor
from cluster.tenancy.paging import MOST, Asked
from cluster.types import Principal
from deployments.gateway import exchange, limits
from deployments.gateway.openai.bounded import Bounded
from deployments.gateway.openai.types import parse
from deployments.gateway.routes import entrance

Form = TypeVar("Form", bound=Bounded)
_SIGNS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def _identifier(value: str) -> str:
    """What can't be an id is the id of nothing. Raises NotFound."""
    if not (0 < len(value) <= 63 and _SIGNS.issuperset(value)):
        raise NotFound("There is no such thing.")
    return value


Id = Annotated[str, Path(), AfterValidator(_identifier)]


async def _page(
    limit: Annotated[int, Query(ge=1, le=MOST)] = 20,
    after: Annotated[str | None, Query(pattern=r"^[a-zA-Z0-9._-]{1,63}$")] = None,
    order: Literal["asc", "desc"] = "asc",
) -> Asked:
    return Asked(limit, after, order)


Paged = Annotated[Asked, Depends(_page)]


@dataclass(frozen=True)
class Act:
    request: Request
    accounts: Accounts
    principal: Principal
    organization: str

    @classmethod
    def of(cls, request: Request) -> Act:
        """Raises Forbidden for a key of no organization."""
        notes, accounts = exchange.of(request.scope), entrance(request).accounts
        principal = notes.principal
        assert accounts is not None, "these routes exist only with accounts"
        if principal is None or not principal.organization or principal.tenant:
            raise Forbidden("Only an admin key administers an organization.")
        actor = Actor("api_key", principal.key_id, address=request.client.host if request.client else None)
        return cls(request, accounts.by(actor, notes.request_id), principal, principal.organization)

    def form(self, kind: type[Form]) -> Form:
        """The body; an empty one is an empty object. Raises InvalidRequest."""
        raw = exchange.of(self.request.scope).body or b"{}"
        return parse(kind, limits.decode_json(raw, entrance(self.request).settings.max_json_depth))

    def may_grant(self, granted: Iterable[str]) -> None:
        """Raises Forbidden when the actor gives or takes more than they hold."""
        permissions.may_grant(self.principal.scopes, granted)

    def may_touch(self, user: str) -> None:
        """Raises Forbidden when the user may do more than the actor, and NotFound."""
        self.accounts.users.get(self.organization, user)
        self.may_grant(self.accounts.permissions(self.organization, "user", user))

    def ends_at(self, seconds: int | None) -> float | None:
        return None if seconds is None else self.accounts.clock() + seconds
