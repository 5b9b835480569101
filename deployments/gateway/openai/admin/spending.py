"""What spend limits and spend alerts have in common: whose they are, and amounts in cents of the platform's one currency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from cluster.errors import InvalidRequest
from cluster.tenancy import budgets, money
from deployments.gateway.openai.admin.acting import Act

CENT = money.MICRO // 100
Cents = Annotated[int, Field(le=money.LARGEST // CENT)]
Currency = Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")]


@dataclass(frozen=True, slots=True)
class Place:
    """An organization or one of its projects."""

    kind: Literal["organization", "project"]
    name: str

    @classmethod
    def of(cls, act: Act, project_id: str | None) -> Place:
        """Raises NotFound for another organization's project."""
        if project_id is None:
            return cls("organization", act.organization)
        return cls("project", act.accounts.projects.get(act.organization, project_id).id)

    @property
    def scope(self) -> str:
        return budgets.scope(self.kind, self.name)


def check_currency(act: Act, named: str) -> None:
    """Raises InvalidRequest: no amount here is ever converted."""
    if named != (ours := act.accounts.prices.currency()):
        raise InvalidRequest(f"Amounts on this platform are in {ours}.", param="currency")
