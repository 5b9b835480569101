"""Whether a project lets the platform keep inputs and outputs of its calls: which share, how long, redacted by what. Nobody's are
kept who didn't say so."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import sqlalchemy as sa
from sqlalchemy import Column, Float, String, Table

from cluster.errors import InvalidRequest
from cluster.store import Store, metadata
from cluster.tenancy import acts, projects
from cluster.tenancy.acts import Note, unnoted
from cluster.tenancy.redaction import REDACTIONS
from cluster.types import NAME

consents = Table(
    "consents",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("share", Float(53), nullable=False),  # of calls, 0 to 1
    Column("keep_s", Float(53), nullable=False),
    Column("redaction", String(63)),
    Column("changed_at", Float(53), nullable=False),
)

DAY_S = 86400.0
MAX_DAYS = 3650


@dataclass(frozen=True, slots=True)
class Consent:
    """What a project allows. `share` 0 keeps nothing new; what is there stays until its time is over or it is forgotten."""

    tenant: str
    share: float
    keep_s: float = 30 * DAY_S
    redaction: str | None = "keys"  # the name of a hook; None: as it was

    def takes(self, request_id: str) -> bool:
        """Whether this call is in the sample: decided by the random end of its identifier alone, alike on every gateway."""
        return int(request_id[-8:], 16) < self.share * (1 << 32)


class Consents:
    """The consents in the store."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time, note: Note = unnoted) -> None:
        self._store = store
        self._clock = clock
        self._note = note

    def put(self, consent: Consent) -> None:
        """Give, change or (`share=0`) withdraw. Raises InvalidRequest for values out of range."""
        _check(consent)
        row = {**asdict(consent), "changed_at": self._clock()}
        with acts.begin(self._store, self._note) as begun:
            rows = begun.at(projects.organization_of(begun.connection, consent.tenant), consent.tenant)
            rows.put("project.updated", consents, consents.c.tenant == consent.tenant, row, "tenant")

    def list(self) -> list[Consent]:
        with self._store.read() as connection:
            return [_consent(row) for row in connection.execute(sa.select(consents).order_by(consents.c.tenant))]


def _consent(row: sa.Row[tuple[object, ...]]) -> Consent:
    return Consent(row.tenant, row.share, row.keep_s, row.redaction)


def _check(consent: Consent) -> None:
    if NAME.match(consent.tenant) is None:
        raise InvalidRequest(f"{consent.tenant!r} is not a project", param="tenant")
    if not 0 <= consent.share <= 1:
        raise InvalidRequest("the share of calls to keep is a number from 0 to 1", param="share")
    if not 0 < consent.keep_s <= MAX_DAYS * DAY_S:
        raise InvalidRequest(f"calls are kept for more than 0 and at most {MAX_DAYS} days", param="keep_s")
    if consent.redaction is not None and consent.redaction not in REDACTIONS:
        known = ", ".join(sorted(REDACTIONS))
        raise InvalidRequest(f"{consent.redaction!r} is no redaction; there are {known}", param="redaction")
