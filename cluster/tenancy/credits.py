"""Credits: amounts granted to an organization that its invoices use up, those that expire first before the others.

A grant is an account of its own in the ledger, so what is left of it is that account's balance. A correction of an invoice that was
issued is a grant, too: invoices never change.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Connection, Float, String, Table

from cluster.errors import InvalidRequest
from cluster.store import Store, metadata
from cluster.tenancy import acts, journal, money, postings
from cluster.tenancy.acts import Note, unnoted
from cluster.tenancy.journal_tables import entries

grants = Table(
    "grants",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("organization", String(63), nullable=False, index=True),
    Column("amount", BigInteger, nullable=False),
    Column("reason", String(200), nullable=False),
    Column("granted_at", Float(53), nullable=False),
    Column("expires_at", Float(53)),
)


@dataclass(frozen=True, slots=True)
class Grant:
    """`amount` and `left` in micro-units; times in seconds since the epoch."""

    id: str
    organization: str
    amount: int
    reason: str
    granted_at: float
    expires_at: float | None
    left: int


class Credits:
    """The grants in the store."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time, note: Note = unnoted) -> None:
        self._store = store
        self._clock = clock
        self._note = note

    def grant(self, organization: str, amount: int, reason: str, expires_at: float | None = None) -> Grant:
        """Raises InvalidRequest."""
        now = self._clock()
        if not 0 < amount <= money.LARGEST:
            raise InvalidRequest(f"a credit is more than nothing and at most {money.plain(money.LARGEST)}", param="amount")
        if not (0 < len(reason) <= 200 and reason.isprintable()):
            raise InvalidRequest("a credit's reason is 1 to 200 printable characters", param="reason")
        if expires_at is not None and not expires_at > now:
            raise InvalidRequest("a credit must expire in the future", param="expires_at")
        made = Grant(f"grant_{secrets.token_hex(12)}", organization, amount, reason, now, expires_at, amount)
        with journal.opened(self._store, organization, now) as page:
            page.post(made.id, "grant", postings.moved(amount, postings.GRANTED, postings.credit(made.id)))
            with acts.within(page.connection, self._note, organization) as rows:
                rows.insert("credit.granted", grants, {column.name: getattr(made, column.name) for column in grants.c})
        return made

    def list(self, organization: str) -> list[Grant]:
        """In the order in which they will be used."""
        with self._store.read() as connection:
            return read(connection, organization)


def read(connection: Connection, organization: str) -> list[Grant]:
    last = grants.c.expires_at.is_(None)
    order = (last, grants.c.expires_at, grants.c.granted_at, grants.c.id)
    rows = connection.execute(sa.select(grants).where(grants.c.organization == organization).order_by(*order)).all()
    account = entries.c.account
    sums = sa.select(account, sa.func.sum(entries.c.amount)).where(account.in_([postings.credit(row.id) for row in rows]))
    left = {of: -int(total) for of, total in connection.execute(sums.group_by(account))}
    return [Grant(**row._mapping, left=left.get(postings.credit(row.id), 0)) for row in rows]
