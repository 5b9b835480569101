"""Invoices: what an organization used in a month, line by line, with the plan's fee and minimum, less its credits.

Issued once for a month that is over, and never changed. Lines are sums of the ledger's entries; an invoice whose lines don't come
to what usage records say is not issued. Issuing closes the month: whatever is booked later is booked into a later one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Connection, Float, Integer, String, Table, Text, UniqueConstraint

from cluster.errors import Conflict, NotFound, PlatformError
from cluster.store import Store, metadata
from cluster.tenancy import acts, credits, journal, journal_tables, money, periods, postings
from cluster.tenancy.acts import Note, unnoted
from cluster.tenancy.journal_tables import entries, usage_records
from cluster.tenancy.metered import METERS
from cluster.tenancy.postings import Entry
from cluster.tenancy.prices import Prices
from cluster.tenancy.rating import PriceList

invoices = Table(
    "invoices",
    metadata,
    Column("id", String(100), primary_key=True),
    Column("organization", String(63), nullable=False),
    Column("month", Integer, nullable=False),
    Column("issued_at", Float(53), nullable=False),
    Column("total", BigInteger, nullable=False),
    Column("body", Text, nullable=False),  # an Invoice as JSON
    UniqueConstraint("organization", "month", name="uq_invoices_organization_month"),
)


@dataclass(frozen=True, slots=True)
class Line:
    """`amount` micro-units for `quantity` units, a decimal number as text. `unit_price` is the plan's where it has but one, for
    `per` units, else None. The plan's fee and minimum are lines without a model; `price` is the version."""

    project: str
    model: str
    meter: str
    price: int
    quantity: str
    unit: str
    unit_price: str | None
    per: int
    amount: int


@dataclass(frozen=True, slots=True)
class Used:
    """Micro-units taken from a grant of credit."""

    grant: str
    reason: str
    amount: int


@dataclass(frozen=True, slots=True)
class Invoice:
    """`issued_at` is None for a draft of a month that isn't closed. Due is what the lines come to less the credits."""

    id: str
    organization: str
    month: str
    currency: str
    issued_at: float | None
    lines: tuple[Line, ...]
    credits: tuple[Used, ...] = ()

    @property
    def subtotal(self) -> int:
        return sum(line.amount for line in self.lines)

    @property
    def total(self) -> int:
        return self.subtotal - sum(used.amount for used in self.credits)


class Invoices:
    """The invoices in the store."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time, note: Note = unnoted) -> None:
        self._store = store
        self._clock = clock
        self._note = note
        self._prices = Prices(store, clock)

    def draft(self, organization: str, month: str) -> Invoice:
        """What the month comes to by now, credits included; nothing is written."""
        with self._store.read() as connection:
            return self._composed(connection, organization, periods.parse_month(month))

    def current(self, organization: str, month: str) -> Invoice:
        """The invoice if it was issued, else its draft."""
        try:
            return self.get(organization, month)
        except NotFound:
            return self.draft(organization, month)

    def issue(self, organization: str, month: str) -> Invoice:
        """Close the month; an invoice that was issued before is returned as it is. Raises Conflict before the month has ended."""
        number, now = periods.parse_month(month), self._clock()
        if now < periods.month_start(number + 1):
            raise Conflict(f"{month} has not ended yet")
        with journal.opened(self._store, organization, now) as page:
            if (issued := _issued(page.connection, organization, number)) is not None:
                return issued
            _lapse(page, periods.month_start(number + 1))
            made = self._composed(page.connection, organization, number, now)
            page.post(made.id, "invoice", _movements(made))
            with acts.within(page.connection, self._note, organization) as rows:
                rows.insert("invoice.issued", invoices, _row(made, number))
        return made

    def get(self, organization: str, month: str) -> Invoice:
        """Raises NotFound when it was not issued."""
        with self._store.read() as connection:
            found = _issued(connection, organization, periods.parse_month(month))
        if found is None:
            raise NotFound(f"there is no invoice of {month}", param="month")
        return found

    def list(self, organization: str | None = None) -> Sequence[Invoice]:
        """By organization and month."""
        query = sa.select(invoices.c.body).order_by(invoices.c.organization, invoices.c.month)
        if organization is not None:
            query = query.where(invoices.c.organization == organization)
        with self._store.read() as connection:
            return [msgspec.json.decode(body, type=Invoice) for body in connection.scalars(query)]

    def _composed(self, connection: Connection, organization: str, month: int, issued_at: float | None = None) -> Invoice:
        changes = self._prices.changes(connection, [organization])
        closing = changes.version_at(organization, periods.month_start(month + 1) - 1e-3)
        rows = sums(connection, organization, month)
        known = self._prices.bodies(connection, {row.price for row in rows} | {closing})
        lines = [line_of(row, known[row.price]) for row in rows]
        _check(connection, organization, month, sum(line.amount for line in lines))
        lines += _monthly(closing, known[closing], sum(line.amount for line in lines))
        name = periods.month_text(month)
        due = sum(line.amount for line in lines)
        used = _credited(connection, organization, due, periods.month_start(month + 1))
        return Invoice(f"INV-{name}-{organization}", organization, name, known[closing].currency, issued_at, tuple(lines), used)


def sums(connection: Connection, organization: str, month: int, *, by_day: bool = False) -> Sequence[Any]:
    """Quantity and amount of a month's usage by project, model, meter and version of prices, by day too if wanted."""
    p, e = journal_tables.postings.c, entries.c
    group = [*([p.day] if by_day else []), p.project, e.model, e.meter, e.price]
    first, after = (periods.day_of(periods.month_start(month + n)) for n in (0, 1))
    query = (
        sa.select(*group, sa.func.sum(e.quantity).label("quantity"), (-sa.func.sum(e.amount)).label("amount"))
        .join_from(journal_tables.postings, entries, sa.and_(p.organization == e.organization, p.seq == e.seq))
        .where(p.organization == organization, p.kind == "settle", p.day >= first, p.day < after, e.account == postings.REVENUE)
        .group_by(*group)
        .order_by(*group)
    )
    return connection.execute(query).all()


def line_of(row: sa.Row[Any], prices: PriceList) -> Line:
    meter = METERS[row.meter]
    charge = prices.charge(row.model, row.meter)
    steps = charge.steps if charge else ()
    single = str(steps[0].price) if len(steps) == 1 else None
    quantity = f"{Decimal(int(row.quantity)) / meter.scale:f}"
    per = charge.per if charge else 1
    return Line(row.project, row.model, row.meter, row.price, quantity, meter.unit, single, per, int(row.amount))


def _check(connection: Connection, organization: str, month: int, amount: int) -> None:
    """The same month by the other record of it."""
    c = usage_records.c
    first, after = periods.month_start(month), periods.month_start(month + 1)
    total = sa.select(sa.func.sum(c.amount)).where(c.organization == organization, c.booked_at >= first, c.booked_at < after)
    recorded = int(connection.scalar(total) or 0)
    if recorded != amount:
        raise PlatformError(f"entries of {organization} come to {amount} micro-units and usage to {recorded}: not invoiced")


def _monthly(version: int, prices: PriceList, usage: int) -> list[Line]:
    fee, least = (int(price * money.MICRO) for price in (prices.fee, prices.minimum))
    wanted = (("fee", fee), ("minimum", least - usage - fee))
    return [Line("", "", what, version, "1", "Months", money.plain(owed), 1, owed) for what, owed in wanted if owed > 0]


def _credited(connection: Connection, organization: str, due: int, end: float) -> tuple[Used, ...]:
    used = []
    for grant in credits.read(connection, organization):
        taken = min(due, grant.left) if grant.expires_at is None or grant.expires_at >= end else 0
        if taken > 0:
            used.append(Used(grant.id, grant.reason, taken))
            due -= taken
    return tuple(used)


def _lapse(page: journal.Page, end: float) -> None:
    """Take back what is left of grants that expired before the month's end."""
    for grant in credits.read(page.connection, page.balance.scope.partition(":")[2]):
        if grant.left > 0 and grant.expires_at is not None and grant.expires_at < end:
            page.post(grant.id, "lapse", postings.moved(grant.left, postings.credit(grant.id), postings.GRANTED))


def _movements(made: Invoice) -> list[Entry]:
    """What was receivable is invoiced now, fee and minimum are earned, and credits pay their part."""
    monthly = [line for line in made.lines if not line.model]
    moves = [Entry(postings.REVENUE, -line.amount, None, line.meter, 1, line.price) for line in monthly]
    moves += [Entry(postings.credit(used.grant), used.amount) for used in made.credits]
    usage = made.subtotal - sum(line.amount for line in monthly)
    both = ((postings.receivable(made.organization), -usage), (postings.invoiced(made.organization), made.total))
    return moves + [Entry(account, amount) for account, amount in both if amount]


def _issued(connection: Connection, organization: str, month: int) -> Invoice | None:
    c = invoices.c
    body = connection.scalar(sa.select(c.body).where(c.organization == organization, c.month == month))
    return msgspec.json.decode(body, type=Invoice) if body else None


def _row(made: Invoice, month: int) -> dict[str, object]:
    own = {name: getattr(made, name) for name in ("id", "organization", "issued_at", "total")}
    return own | {"month": month, "body": msgspec.json.encode(made).decode()}
