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
from cluster.tenancy.audit import Audit
from cluster.tenancy.chain import Actor
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
    """The consents in the store. Changes are administrative acts, so they go into the audit log in the same transaction."""

    def __init__(self, store: Store, audit: Audit, redactions: frozenset[str], clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._audit = audit
        self._redactions = redactions
        self._clock = clock

    def put(self, actor: Actor, consent: Consent, organization: str = "") -> None:
        """Give, change or (`share=0`) withdraw. Raises InvalidRequest for values out of range."""
        self._check(consent)
        row = {**asdict(consent), "changed_at": self._clock()}
        with self._store.begin() as connection:
            same = consents.c.tenant == consent.tenant
            before = connection.execute(sa.select(consents).where(same).with_for_update()).one_or_none()
            connection.execute(consents.update().where(same).values(row) if before else consents.insert().values(row))
            was = {"kept_calls": asdict(_consent(before))} if before else None
            self._audit.record(
                *(actor, "project.updated", consent.tenant, was, {"kept_calls": asdict(consent)}),
                organization=organization,
                project=consent.tenant,
                connection=connection,
            )

    def list(self) -> list[Consent]:
        with self._store.read() as connection:
            return [_consent(row) for row in connection.execute(sa.select(consents).order_by(consents.c.tenant))]

    def _check(self, consent: Consent) -> None:
        if NAME.match(consent.tenant) is None:
            raise InvalidRequest(f"{consent.tenant!r} is not a project", param="tenant")
        if not 0 <= consent.share <= 1:
            raise InvalidRequest("the share of calls to keep is a number from 0 to 1", param="share")
        if not 0 < consent.keep_s <= MAX_DAYS * DAY_S:
            raise InvalidRequest(f"calls are kept for more than 0 and at most {MAX_DAYS} days", param="keep_s")
        if consent.redaction is not None and consent.redaction not in self._redactions:
            known = ", ".join(sorted(self._redactions))
            raise InvalidRequest(f"{consent.redaction!r} is no redaction; there are {known}", param="redaction")


def _consent(row: sa.Row[tuple[object, ...]]) -> Consent:
    return Consent(row.tenant, row.share, row.keep_s, row.redaction)
