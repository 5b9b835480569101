"""Plans and their versions of prices, and which plan an organization is on. All three only grow: nothing is ever changed back.

A version takes effect at a time that may not lie in the past, so no request that was made is ever priced anew. A request is priced
by the version in force when it was reserved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import pydantic
import sqlalchemy as sa
from sqlalchemy import Column, Connection, Float, Integer, String, Table, Text

from cluster.errors import Conflict, InvalidRequest, NotFound
from cluster.prepared import Prepared
from cluster.store import Store, metadata
from cluster.tenancy import acts
from cluster.tenancy.acts import Note, unnoted
from cluster.tenancy.rating import PriceList
from cluster.types import NAME

DEFAULT_PLAN = "default"
"""The plan of every organization that was put on no other."""

price_versions = Table(
    "price_versions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("plan", String(63), nullable=False, index=True),
    Column("effective_at", Float(53), nullable=False),  # seconds since the epoch, here and below
    Column("created_at", Float(53), nullable=False),
    Column("body", Text, nullable=False),  # a PriceList as JSON
)

plan_changes = Table(
    "plan_changes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("organization", String(63), nullable=False, index=True),
    Column("plan", String(63), nullable=False),
    Column("effective_at", Float(53), nullable=False),
)

FREE = PriceList()
"""What is in force where nobody has set prices: everything is counted and costs nothing. Its version is 0."""


@dataclass(frozen=True, slots=True)
class PriceVersion:
    id: int
    plan: str
    effective_at: float
    prices: PriceList


@dataclass(frozen=True, slots=True)
class Changes:
    """What is known of versions and plans at one moment, for lookups without the store; prices are in `bodies`."""

    versions: tuple[tuple[int, str, float], ...]  # id, plan, effective_at; by time
    plans: tuple[tuple[str, str, float], ...]  # organization, plan, effective_at; by time

    def version_at(self, organization: str, at: float) -> int:
        """The version in force: 0 when there is none."""
        plan = next((plan for org, plan, since in reversed(self.plans) if org == organization and since <= at), DEFAULT_PLAN)
        return next((id for id, of, since in reversed(self.versions) if of == plan and since <= at), 0)


_VERSIONS = Prepared(
    sa.select(price_versions.c.id, price_versions.c.plan, price_versions.c.effective_at).order_by(
        price_versions.c.effective_at, price_versions.c.id
    )
)
_PLANS = Prepared(
    sa.select(plan_changes.c.organization, plan_changes.c.plan, plan_changes.c.effective_at)
    .where(plan_changes.c.organization.in_(sa.bindparam("organizations", expanding=True)))
    .order_by(plan_changes.c.effective_at, plan_changes.c.id),
    "organizations",
)


class Prices:
    """The plans in the store."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time, note: Note = unnoted) -> None:
        self._store = store
        self._clock = clock
        self._note = note
        self._known: dict[int, PriceList] = {0: FREE}

    def publish(self, plan: str, prices: PriceList, effective_at: float | None = None) -> PriceVersion:
        """A new version of a plan, from now on or from later. Raises InvalidRequest for a time in the past or another currency,
        Conflict for one before a version that is announced already."""
        now = self._clock()
        since = now if effective_at is None else effective_at
        if NAME.match(plan) is None:
            raise InvalidRequest(f"{plan[:80]!r} is not a plan's name (lower case, digits, '.', '_', '-')", param="plan")
        if since < now:
            raise InvalidRequest("prices can't take effect in the past", param="effective_at")
        with acts.begin(self._store, self._note) as rows:
            self._check(rows.connection, prices, plan, since)
            row = {"plan": plan, "effective_at": since, "created_at": now, "body": prices.model_dump_json()}
            made = rows.insert("prices.published", price_versions, row, "plan")
            return PriceVersion(made["id"], plan, since, prices)

    def subscribe(self, organization: str, plan: str) -> None:
        """Put an organization on a plan from now on. Raises NotFound for a plan that has no version."""
        with acts.begin(self._store, self._note, organization) as rows:
            if rows.connection.scalar(sa.select(price_versions.c.id).where(price_versions.c.plan == plan).limit(1)) is None:
                raise NotFound(f"there is no plan {plan[:80]!r}", param="plan")
            row = {"organization": organization, "plan": plan, "effective_at": self._clock()}
            rows.insert("plan.subscribed", plan_changes, row, "organization")

    def list(self) -> list[PriceVersion]:
        """All versions, by plan and time."""
        with self._store.read() as connection:
            rows = connection.execute(sa.select(price_versions).order_by("plan", "effective_at", "id")).all()
        return [PriceVersion(row.id, row.plan, row.effective_at, PriceList.model_validate_json(row.body)) for row in rows]

    def currency(self) -> str:
        """The platform's one currency, three capital letters."""
        with self._store.read() as connection:
            body = connection.scalar(sa.select(price_versions.c.body).limit(1))
        return PriceList.model_validate_json(body).currency if body else FREE.currency

    def of(self, organization: str) -> Sequence[PriceVersion]:
        """All versions of the plan that an organization is on."""
        plan = self.at(organization).plan
        return [version for version in self.list() if version.plan == plan]

    def at(self, organization: str, at: float | None = None) -> PriceVersion:
        """The version in force for an organization."""
        with self._store.read() as connection:
            changes = self.changes(connection, [organization])
            found = changes.version_at(organization, self._clock() if at is None else at)
            prices = self.bodies(connection, [found])[found]
        plan, since = next(((plan, since) for id, plan, since in changes.versions if id == found), (DEFAULT_PLAN, 0.0))
        return PriceVersion(found, plan, since, prices)

    def changes(self, connection: Connection, organizations: Iterable[str]) -> Changes:
        """Read inside the caller's transaction what version is in force when."""
        wanted = sorted(organizations)
        plans = _PLANS.rows(connection, organizations=wanted) if wanted else ()
        return Changes(tuple(_VERSIONS.rows(connection)), tuple(plans))

    def bodies(self, connection: Connection, versions: Iterable[int]) -> Mapping[int, PriceList]:
        """Prices by version. Versions never change, so each is read once."""
        missing = sorted(set(versions) - self._known.keys())
        if missing:
            query = sa.select(price_versions.c.id, price_versions.c.body).where(price_versions.c.id.in_(missing))
            self._known.update({row.id: PriceList.model_validate_json(row.body) for row in connection.execute(query)})
        return self._known

    def _check(self, connection: Connection, prices: PriceList, plan: str, since: float) -> None:
        rows = connection.execute(sa.select(price_versions.c.body, price_versions.c.plan, price_versions.c.effective_at)).all()
        if any(PriceList.model_validate_json(row.body).currency != prices.currency for row in rows):
            raise InvalidRequest("all plans of a platform are in one currency", param="currency")
        if any(row.plan == plan and row.effective_at > since for row in rows):
            raise Conflict(f"plan {plan!r} has a version that takes effect later; a new one can't come before it")


def parse(text: str) -> PriceList:
    """Prices from JSON, as a person wrote them. Raises InvalidRequest that says where they are wrong."""
    try:
        return PriceList.model_validate_json(text)
    except pydantic.ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'prices'}: {e['msg']}" for e in error.errors())
        raise InvalidRequest(f"these are not prices: {problems[:1000]}", param="prices") from None
