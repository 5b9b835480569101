"""The two ways through the ledger's tables: load what a group of operations needs, write what became of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Table

from cluster.prepared import Prepared, Row
from cluster.store import Store
from cluster.tenancy import budgets as limits
from cluster.tenancy import periods
from cluster.tenancy.books import Books, Hold, Used
from cluster.tenancy.budgets import Balance, Budget, balances, scope
from cluster.tenancy.journal_tables import counters, entries, holds, owners, postings, usage_records
from cluster.tenancy.metered import METERS, Metered
from cluster.tenancy.postings import Entry, Kind, Posting
from cluster.tenancy.prices import Prices
from cluster.tenancy.rating import Counter

_HOLD = [field.name for field in fields(Hold) if field.name != "metered"]
_ENTRY = [field.name for field in fields(Entry)]
_BALANCE = [field.name for field in fields(Balance)]

_STATE = [*_HOLD, *METERS]


def _update(table: Table, key: str, names: Iterable[str]) -> Prepared:
    """The names of its parameters begin with `b_`, as SQLAlchemy keeps the columns' own for itself."""
    values: dict[str, Any] = {name: sa.bindparam(f"b_{name}") for name in names}
    return Prepared(table.update().where(table.c[key] == sa.bindparam(f"b_{key}")).values(values))


_IDS: sa.BindParameter[str] = sa.bindparam("ids", expanding=True)
_SCOPES: sa.BindParameter[str] = sa.bindparam("scopes", expanding=True)
_LOCKED = Prepared(
    sa.select(*[balances.c[name] for name in _BALANCE])
    .where(balances.c.scope.in_(_SCOPES))
    .order_by(balances.c.scope)
    .with_for_update(),
    "scopes",
)
_OPEN = Prepared(sa.select(*[holds.c[name] for name in _STATE]).where(holds.c.request_id.in_(_IDS)), "ids")
_CLOSED = Prepared(sa.select(usage_records.c.request_id, usage_records.c.amount).where(usage_records.c.request_id.in_(_IDS)), "ids")
_COUNTED = Prepared(
    sa.select(counters.c.organization, counters.c.charge, counters.c.label, counters.c.quantity).where(
        counters.c.organization.in_(sa.bindparam("organizations", expanding=True)),
        counters.c.label.in_(sa.bindparam("labels", expanding=True)),
    ),
    "organizations",
    "labels",
)
_POST, _ENTER, _USE, _RESERVE = (Prepared(table.insert()) for table in (postings, entries, usage_records, holds))
_LET_GO = Prepared(holds.delete().where(holds.c.request_id == sa.bindparam("gone")))
_MOVE_HOLD = _update(holds, "request_id", METERS)
_MOVE_BALANCE = _update(balances, "scope", [name for name in _BALANCE if name != "scope"])


def _hold(row: Row) -> Hold:
    named = dict(zip(_HOLD, row, strict=False))
    return Hold(**named, metered=Metered(*row[len(_HOLD) :]))


def hold_row(hold: Hold) -> dict[str, Any]:
    return _row(hold, _HOLD) | _row(hold.metered, METERS)


def _row(of: object, names: Iterable[str], prefix: str = "") -> dict[str, Any]:
    """`dataclasses.asdict` copies every value, deeply."""
    return {prefix + name: getattr(of, name) for name in names}


def scopes_of(connection: Connection, request_ids: Collection[str]) -> dict[str, tuple[str, str, str]]:
    """The scopes of open reservations, without a lock: these never change while a reservation lives."""
    found = map(_hold, _OPEN.rows(connection, ids=sorted(request_ids)))
    return {hold.request_id: hold.scopes for hold in found}


def lock(connection: Connection, scopes: Collection[str]) -> dict[str, Balance]:
    """These balances, nobody else's until the transaction ends. In one order everywhere, so that nobody waits in a circle."""
    found = (Balance(*row) for row in _LOCKED.rows(connection, scopes=sorted(scopes))) if scopes else ()
    return {balance.scope: balance for balance in found}


def create(connection: Connection, scopes: Collection[str]) -> None:
    """Empty balances for scopes that have none."""
    rows = [asdict(Balance(name)) for name in sorted(scopes)]
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert

        connection.execute(insert(balances).on_conflict_do_nothing(), rows)
    else:
        connection.execute(balances.insert().prefix_with("OR IGNORE"), rows)


def load(
    connection: Connection,
    prices: Prices,
    found: dict[str, Balance],
    known: Collection[str],
    now: float,
    owner: str,
    *,
    settles: bool,
) -> Books:
    """All that operations can need, once the balances are locked. `known`: requests that were reserved before; that a new one is
    new, the tables make sure. `settles`: whether anything is charged."""
    ids = sorted(known)
    organizations = [name.partition(":")[2] for name in found if name.startswith("organization:")]
    reserved = map(_hold, _OPEN.rows(connection, ids=ids) if ids else ())
    open_now = {hold.request_id: hold for hold in reserved if found.keys() >= set(hold.scopes)}
    changes = prices.changes(connection, organizations)
    times = {name: max(now, found[scope("organization", name)].booked_at) for name in organizations}
    versions = {hold.price for hold in open_now.values()} | {changes.version_at(name, at) for name, at in times.items()}
    return Books(
        now=now,
        owner=owner,
        balances=found,
        budgets=_by_scope(limits.read(connection, sorted(found))),
        holds=open_now,
        closed=_closed(connection, [request_id for request_id in ids if request_id not in open_now]),
        orphans=frozenset(),
        changes=changes,
        prices=prices.bodies(connection, versions),
        counters=_counters(connection, organizations, times.values()) if settles else {},
    )


def _closed(connection: Connection, ids: Sequence[str]) -> dict[str, int]:
    return dict(_CLOSED.rows(connection, ids=ids)) if ids else {}


def renew(connection: Connection, owner: str) -> None:
    renewed = connection.execute(owners.update().where(owners.c.owner == owner).values(beat=owners.c.beat + 1))
    if not renewed.rowcount:
        connection.execute(owners.insert().values(owner=owner, beat=1))


def beats(connection: Connection) -> dict[str, int]:
    """Of owners with something open."""
    query = sa.select(owners.c.owner, owners.c.beat).where(owners.c.owner.in_(sa.select(holds.c.owner)))
    return {row.owner: row.beat for row in connection.execute(query)}


def orphans(
    connection: Connection, silent: Mapping[str, int], opened_before: float, limit: int, among: Collection[str] | None = None
) -> list[str]:
    """Open requests of owners that are silent since this beat, and those that are open since before any request may be."""
    heard = sa.tuple_(owners.c.owner, owners.c.beat).in_(sorted(silent.items()))
    query = sa.select(holds.c.request_id).outerjoin(owners, owners.c.owner == holds.c.owner)
    query = query.where(sa.or_(heard, holds.c.opened_at < opened_before))
    if among is not None:
        query = query.where(holds.c.request_id.in_(sorted(among)))
    return list(connection.scalars(query.order_by(holds.c.opened_at, holds.c.request_id).limit(limit)))


def _by_scope(found: Iterable[Budget]) -> dict[str, list[Budget]]:
    by_scope: dict[str, list[Budget]] = {}
    for budget in found:
        by_scope.setdefault(budget.scope, []).append(budget)
    return by_scope


def _counters(connection: Connection, organizations: Sequence[str], times: Iterable[float]) -> dict[str, dict[Counter, int]]:
    labels = {label for at in times for label in (periods.day_of(at), periods.month_of(at))}
    loaded: dict[str, dict[Counter, int]] = {}
    rows = _COUNTED.rows(connection, organizations=organizations, labels=sorted(labels)) if organizations else ()
    for organization, charge, label, quantity in rows:
        loaded.setdefault(organization, {})[charge, label] = quantity
    return loaded


def write(connection: Connection, books: Books, before: dict[str, Hold]) -> None:
    """Everything that changed since `load`; `before`: the holds as they were then."""
    append(connection, books.postings)
    if books.used:
        _USE.run_each(connection, [_used_row(used) for used in books.used])
    _write_holds(connection, books.holds, before)
    save(connection, [books.balances[name] for name in sorted(books.touched)])
    _write_counters(connection, books)


def append(connection: Connection, made: Sequence[Posting]) -> None:
    if not made:
        return
    names = ("organization", "seq", "subject", "kind", "project", "booked_at")
    _POST.run_each(connection, [_row(posting, names) | {"day": periods.day_of(posting.booked_at)} for posting in made])
    lines = [
        {"organization": posting.organization, "seq": posting.seq, "line": line} | _row(entry, _ENTRY)
        for posting in made
        for line, entry in enumerate(posting.entries)
    ]
    if lines:
        _ENTER.run_each(connection, lines)


def save(connection: Connection, changed: Sequence[Balance]) -> None:
    if changed:
        _MOVE_BALANCE.run_each(connection, [_row(each, _BALANCE, "b_") for each in changed])


def _used_row(used: Used) -> dict[str, Any]:
    names = ("request_id", "organization", "project", "key_id", "model", "price", "opened_at", "operation")
    own = ("seq", "outcome", "booked_at", "amount")
    return _row(used.hold, names) | _row(used, own) | _row(used.metered, METERS)


def _write_holds(connection: Connection, after: dict[str, Hold], before: dict[str, Hold]) -> None:
    if gone := [request_id for request_id in before if request_id not in after]:
        _LET_GO.run_each(connection, [{"gone": request_id} for request_id in gone])
    if new := [hold_row(hold) for request_id, hold in after.items() if request_id not in before]:
        _RESERVE.run_each(connection, new)
    if moved := [hold for request_id, hold in after.items() if request_id in before and hold != before[request_id]]:
        _MOVE_HOLD.run_each(connection, [{"b_request_id": hold.request_id} | _row(hold.metered, METERS, "b_") for hold in moved])


def _write_counters(connection: Connection, books: Books) -> None:
    rows = [
        {"organization": organization, "charge": charge, "label": label, "quantity": books.counters[organization][charge, label]}
        for organization, (charge, label) in sorted(books.counted)
    ]
    if not rows:
        return
    _set_counters(connection.dialect.name).run_each(connection, rows)


@cache
def _set_counters(dialect: str) -> Prepared:
    if dialect == "postgresql":
        from sqlalchemy.dialects.postgresql import insert
    else:
        from sqlalchemy.dialects.sqlite import insert  # type: ignore[assignment]
    statement = insert(counters)
    key = [counters.c.organization, counters.c.charge, counters.c.label]
    return Prepared(statement.on_conflict_do_update(index_elements=key, set_={"quantity": statement.excluded.quantity}))


@dataclass(frozen=True, slots=True)
class Page:
    """An organization's books, locked: what is posted here comes after all that was posted before, in number and in time."""

    connection: Connection
    balance: Balance

    def post(self, subject: str, kind: Kind, moved: Sequence[Entry]) -> Posting:
        self.balance.seq += 1
        organization = self.balance.scope.partition(":")[2]
        posting = Posting(organization, self.balance.seq, subject, kind, "", self.balance.booked_at, tuple(moved))
        append(self.connection, [posting])
        return posting


@contextmanager
def opened(store: Store, organization: str, now: float) -> Iterator[Page]:
    """One transaction. Once it is committed, nothing is booked before `now`, by whatever clock."""
    name = scope("organization", organization)
    with store.begin() as connection:
        create(connection, [name])
    with store.begin() as connection:
        balance = lock(connection, [name])[name]
        balance.reach(now)
        balance.booked_at = max(balance.booked_at, now)
        yield Page(connection, balance)
        save(connection, [balance])
