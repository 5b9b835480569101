"""Whether the ledger's books are right: everything that is kept twice is compared, and every price computed again.

Reads the whole ledger of an organization. It says what is wrong in words and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy import Connection

from cluster.store import Store
from cluster.tenancy import journal_tables, postings, rating
from cluster.tenancy.budgets import balances
from cluster.tenancy.journal_tables import entries, holds, metered_of, usage_records
from cluster.tenancy.prices import Prices
from cluster.tenancy.rating import Booked

_WORKING = "organization:"


def problems(store: Store) -> list[str]:
    """Empty when all is right."""
    with store.read() as connection:
        return [
            *_sums(connection),
            *_numbering(connection),
            *_pairs(connection),
            *_held(connection),
            *_spent(connection),
            *_rated(connection, Prices(store)),
        ]


def _sums(connection: Connection) -> Iterator[str]:
    """Double entry: every posting sums to zero, and so does everything."""
    total = sa.func.sum(entries.c.amount)
    grouped = sa.select(entries.c.organization, entries.c.seq, total).group_by(entries.c.organization, entries.c.seq)
    for organization, seq, amount in connection.execute(grouped.having(total != 0)):
        yield f"posting {seq} of {organization} sums to {amount}"


def _numbering(connection: Connection) -> Iterator[str]:
    """No posting is missing, and the balance knows the last."""
    p = journal_tables.postings.c
    rows = connection.execute(sa.select(p.organization, sa.func.count(), sa.func.max(p.seq)).group_by(p.organization)).all()
    last = {row[0]: row[1:] for row in rows}
    for scope, seq in connection.execute(sa.select(balances.c.scope, balances.c.seq).where(balances.c.scope.startswith(_WORKING))):
        count, most = last.pop(scope.removeprefix(_WORKING), (0, 0))
        if not count == most == seq:
            yield f"{scope} has {count} postings numbered up to {most}, and counts {seq}"
    yield from (f"organization {name} has postings and no balance" for name in last)


def _pairs(connection: Connection) -> Iterator[str]:
    """Every request was reserved once; it is settled once, with one usage record, or still open."""
    p = journal_tables.postings.c
    of_kind = {kind: set(connection.scalars(sa.select(p.subject).where(p.kind == kind))) for kind in ("reserve", "settle")}
    used = set(connection.scalars(sa.select(usage_records.c.request_id)))
    still_open = set(connection.scalars(sa.select(holds.c.request_id)))
    yield from (f"request {name} is settled without a reservation" for name in sorted(of_kind["settle"] - of_kind["reserve"]))
    yield from (f"request {name} is settled and still open" for name in sorted(of_kind["settle"] & still_open))
    yield from (f"request {name} is reserved, not settled and not open" for name in sorted(of_kind["reserve"] - used - still_open))
    yield from (f"request {name} differs between usage and postings" for name in sorted(of_kind["settle"] ^ used))


def _held(connection: Connection) -> Iterator[str]:
    """Reserved amounts by entries, by open reservations and by balances."""
    e, h = entries.c, holds.c
    rows = connection.execute(sa.select(e.account, sa.func.sum(e.amount)).where(e.account.startswith("held/")).group_by(e.account))
    booked = {account.removeprefix("held/"): int(amount) for account, amount in rows if amount}
    worst = sa.func.sum(h.worst)
    for kind, column in (("organization", h.organization), ("project", h.project), ("key", h.key_id)):
        found = {name: int(amount) for name, amount in connection.execute(sa.select(column, worst).group_by(column)) if amount}
        c = balances.c
        kept = dict(map(tuple, connection.execute(sa.select(c.scope, c.held).where(c.scope.startswith(f"{kind}:"), c.held != 0))))
        if {f"{kind}:{name}": amount for name, amount in found.items()} != kept:
            yield f"reservations of {kind}s come to {found}, balances hold {kept}"
        if kind == "project" and found != booked:
            yield f"reservations of projects come to {found}, entries to {booked}"


def _spent(connection: Connection) -> Iterator[str]:
    """Spent amounts by usage records, by balances and by what the ledger says is owed for usage."""
    u, c = usage_records.c, balances.c
    for kind, column in (("organization", u.organization), ("project", u.project), ("key", u.key_id)):
        rows = connection.execute(sa.select(column, sa.func.sum(u.amount)).group_by(column))
        recorded = {f"{kind}:{name}": int(amount) for name, amount in rows if amount}
        kept = dict(map(tuple, connection.execute(sa.select(c.scope, c.spent).where(c.scope.startswith(f"{kind}:"), c.spent != 0))))
        if recorded != kept:
            yield f"usage of {kind}s comes to {recorded}, balances say {kept}"


def _rated(connection: Connection, prices: Prices) -> Iterator[str]:
    """Every settled request priced again, and compared with its record and with what was posted as revenue."""
    posted = _posted(connection)
    c = usage_records.c
    for organization in connection.scalars(sa.select(c.organization).distinct()).all():
        rows = connection.execute(sa.select(usage_records).where(c.organization == organization).order_by(c.seq)).all()
        known = prices.bodies(connection, {row.price for row in rows})
        booked = [Booked(row.price, row.model, metered_of(row), row.booked_at) for row in rows]
        for row, items in zip(rows, rating.replay(booked, known), strict=True):
            amounts = sum(item.amount for item in items), row.amount, posted.get((organization, row.seq), 0)
            if len(set(amounts)) > 1:
                yield f"request {row.request_id}: rated again {amounts[0]}, recorded {amounts[1]}, posted {amounts[2]}"


def _posted(connection: Connection) -> dict[tuple[str, int], int]:
    e = entries.c
    total = sa.select(e.organization, e.seq, -sa.func.sum(e.amount)).where(e.account == postings.REVENUE)
    return {(row[0], row[1]): int(row[2]) for row in connection.execute(total.group_by(e.organization, e.seq))}
