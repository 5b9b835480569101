"""Budgets: the most that an organization, a project or a key may spend in a day, in a month or ever.

A limit holds against what was spent and what is reserved together, so no number of calls at once can pass it. What stands in a
balance is derived from the ledger and kept beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Connection, Float, Integer, String, Table

from cluster.errors import InvalidRequest
from cluster.prepared import Prepared
from cluster.store import Store, metadata
from cluster.tenancy import acts, money, periods, projects
from cluster.tenancy.acts import Note, unnoted
from cluster.tenancy.key_records import api_keys

Period = Literal["day", "month", "total"]
Kind = Literal["organization", "project", "key"]

budgets = Table(
    "budgets",
    metadata,
    Column("scope", String(80), primary_key=True),
    Column("period", String(8), primary_key=True),
    Column("micro", BigInteger, nullable=False),
)

balances = Table(
    "balances",
    metadata,
    Column("scope", String(80), primary_key=True),
    Column("held", BigInteger, nullable=False),  # micro-units, here and below
    Column("day", Integer, nullable=False),
    Column("spent_day", BigInteger, nullable=False),
    Column("month", Integer, nullable=False),
    Column("spent_month", BigInteger, nullable=False),
    Column("spent", BigInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),  # of an organization: number of its last posting
    Column("booked_at", Float(53), nullable=False),  # of an organization: nothing is ever booked before
)


_BY_SCOPE = sa.select(budgets.c.scope, budgets.c.period, budgets.c.micro).order_by(budgets.c.scope, budgets.c.period)
_ALL = Prepared(_BY_SCOPE)
_OF_SCOPES = Prepared(_BY_SCOPE.where(budgets.c.scope.in_(sa.bindparam("scopes", expanding=True))), "scopes")


def scope(kind: Kind, name: str) -> str:
    return f"{kind}:{name}"


@dataclass(slots=True)
class Balance:
    """What one scope has spent and reserved. Windows only move on: a clock that goes back stays in the window that was reached."""

    scope: str
    held: int = 0
    day: int = 0
    spent_day: int = 0
    month: int = 0
    spent_month: int = 0
    spent: int = 0
    seq: int = 0
    booked_at: float = 0.0

    def reach(self, at: float) -> None:
        """Begin the day and the month of `at`, if they are new."""
        if (day := periods.day_of(at)) > self.day:
            self.day, self.spent_day = day, 0
        if (month := periods.month_of(at)) > self.month:
            self.month, self.spent_month = month, 0

    def spend(self, amount: int) -> None:
        self.spent_day += amount
        self.spent_month += amount
        self.spent += amount

    def spent_in(self, period: Period) -> int:
        return {"day": self.spent_day, "month": self.spent_month, "total": self.spent}[period]


@dataclass(frozen=True, slots=True)
class Budget:
    scope: str
    period: Period
    micro: int


def passed(balance: Balance, limits: Iterable[Budget], worst: int) -> Budget | None:
    """The limit that a request of at most `worst` micro-units could pass, if there is one."""
    return next((limit for limit in limits if balance.spent_in(limit.period) + balance.held + worst > limit.micro), None)


class Budgets:
    """The limits in the store."""

    def __init__(self, store: Store, note: Note = unnoted) -> None:
        self._store = store
        self._note = note

    def set(self, kind: Kind, name: str, period: Period, micro: int | None) -> None:
        """None takes the limit away. One below what is spent already refuses whatever comes. Raises InvalidRequest, Conflict."""
        if kind not in get_args(Kind) or period not in get_args(Period):
            raise InvalidRequest("a budget is an organization's, a project's or a key's, for a day, a month or in total")
        if micro is not None and not 0 <= micro <= money.LARGEST:
            raise InvalidRequest(f"a budget is between 0 and {money.plain(money.LARGEST)}", param="amount")
        of = scope(kind, name)
        same = (budgets.c.scope == of) & (budgets.c.period == period)
        with acts.begin(self._store, self._note) as begun:
            rows = begun.at(*place(begun.connection, of))
            if micro is None:
                rows.delete("budget.deleted", budgets, same, "scope")
            else:
                rows.put("budget.updated", budgets, same, {"scope": of, "period": period, "micro": micro}, "scope")

    def get(self, kind: Kind, name: str, period: Period) -> Budget | None:
        with self._store.read() as connection:
            return next((budget for budget in read(connection, [scope(kind, name)]) if budget.period == period), None)

    def list(self) -> list[Budget]:
        with self._store.read() as connection:
            return read(connection)

    def balance(self, kind: Kind, name: str, at: float) -> Balance:
        """What is spent and reserved in the windows of `at`."""
        with self._store.read() as connection:
            row = connection.execute(sa.select(balances).where(balances.c.scope == scope(kind, name))).one_or_none()
        found = Balance(**row._mapping) if row else Balance(scope(kind, name))
        found.reach(at)
        return found


def place(connection: Connection, of: str) -> tuple[str, str | None]:
    """The organization and the project of a scope, as far as they are known."""
    kind, _, name = of.partition(":")
    if kind == "key":
        query = sa.select(api_keys.c.organization_id, api_keys.c.project_id).where(api_keys.c.id == name)
        row = connection.execute(query).one_or_none()
        return (row[0], row[1]) if row else ("", None)
    return (projects.organization_of(connection, name), name) if kind == "project" else (name, None)


def read(connection: Connection, scopes: Sequence[str] | None = None) -> list[Budget]:
    """Of these scopes, or all."""
    if scopes is None:
        return [Budget(*row) for row in _ALL.rows(connection)]
    return [Budget(*row) for row in _OF_SCOPES.rows(connection, scopes=scopes)] if scopes else []
