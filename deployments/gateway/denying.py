"""Denials on their way to the caller are noted for the audit log: who, what, why."""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import PlatformError
from cluster.tenancy.chain import Actor
from cluster.tenancy.denials import Denial, Denials
from deployments.gateway import exchange
from deployments.gateway.exchange import Exchange
from deployments.gateway.stage import Stage

STATUSES = frozenset({401, 403})
CODES = frozenset({"insufficient_quota"})
"""Refusals that aren't about who asks, but count as denials: a budget that is used up."""

_KEY = re.compile(rb"(?i)bearer mk_([0-9a-f]{12})[0-9a-f]{72}")


class NoteDenials(Stage):
    """Stands where errors pass. `paths` are the ones that exist; others are a caller's own words."""

    def __init__(self, app: ASGIApp, denials: Denials | None, paths: frozenset[str]) -> None:
        super().__init__(app)
        self._denials, self._paths = denials, paths

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except PlatformError as error:
            known = scope["path"] if scope["path"] in self._paths else "unmatched"
            route = str(getattr(scope.get("route"), "path", known))
            address = scope["client"][0] if scope.get("client") else None
            note(self._denials, exchange.of(scope), error, route, address, _shown_id(scope))
            raise


def note(
    denials: Denials | None, notes: Exchange, error: PlatformError, target: str, address: str | None = None, shown: str = ""
) -> None:
    """Remember a refusal. `shown`: the id of the key that was presented but proves nothing."""
    if denials is None or not (error.status in STATUSES or error.public_code in CODES):
        return
    principal = notes.principal
    actor = Actor("api_key", principal.key_id if principal else shown or "unknown", address=address)
    denials.note(
        Denial(
            *(actor, error.public_code, target, error.status),
            organization=principal.organization if principal else "",
            project=principal.tenant if principal else None,
        ),
        notes.request_id,
    )


def _shown_id(scope: Scope) -> str:
    """The public part of a key that has the form of one."""
    found = next((match for name, value in scope["headers"] if name == b"authorization" and (match := _KEY.fullmatch(value))), None)
    return found[1].decode() if found else ""
