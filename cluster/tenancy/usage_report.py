"""Usage and costs over time: sums of the ledger's records in buckets, by whatever is asked for. Pages and commands show them.

A bucket is a whole minute, hour or day in UTC, cut off where the question begins and ends. Seconds are counted as whole numbers, so
that no rounding moves a request from one bucket to the next, and questions that meet add up.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import sqlalchemy as sa

from cluster.errors import InvalidRequest
from cluster.store import Store
from cluster.tenancy import postings
from cluster.tenancy.journal_tables import entries, metered_of, usage_records
from cluster.tenancy.key_records import api_keys
from cluster.tenancy.metered import METERS, Metered

By = Literal["project", "user_id", "key_id", "model", "operation", "outcome", "line"]
"""`user_id`: whom the key belongs to, if it is a person's. `line`: the model and the meter; costs have it, usage doesn't."""

MOST_BUCKETS = 1500
_FOREVER = 1 << 40  # seconds: one bucket holds everything


@dataclass(frozen=True, slots=True)
class Sum:
    """Everything that was booked from `begins` on until the bucket's end, for the group's values. `amount` is in micro-units."""

    begins: int
    group: Mapping[str, str | None]
    metered: Metered
    amount: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What it cost, in micro-units. `quantity`: smallest units of the meter, if costs are asked for by line."""

    begins: int
    group: Mapping[str, str | None]
    quantity: int | None
    amount: int


@dataclass(frozen=True, slots=True)
class Question:
    """Seconds since the epoch, `end` excluded. One bucket over all without `width_s`. Without an organization, over all of them."""

    start: float
    end: float
    width_s: int | None = None
    by: Sequence[By] = ()
    organization: str | None = None
    only: Mapping[By, Collection[str]] = field(default_factory=dict)


_COLUMNS: dict[str, sa.ColumnElement[Any]] = {
    **{name: usage_records.c[name] for name in ("project", "key_id", "model", "operation", "outcome")},
    "user_id": api_keys.c.user_id,
    "line": entries.c.model + sa.literal_column("', '") + entries.c.meter,
}
assert _COLUMNS.keys() == set(get_args(By))


def usage(store: Store, asked: Question) -> list[Sum]:
    """Sums by bucket and group, in this order; buckets without any usage are left out. Raises InvalidRequest."""
    if "line" in {*asked.by, *asked.only}:
        raise InvalidRequest("usage has no lines: they are those of costs", param="group_by")
    rows = _summed(store, asked, usage_records, {name: usage_records.c[name] for name in (*METERS, "amount")})
    return [Sum(_begins(asked, row), _group(asked, row), metered_of(row), row.amount) for row in rows]


def costs(store: Store, asked: Question) -> list[Cost]:
    """Likewise, from the entries of revenue, what was free included. They come to the same amounts. Raises InvalidRequest."""
    e, u = entries.c, usage_records.c
    settled = sa.and_(e.organization == u.organization, e.seq == u.seq, e.account == postings.REVENUE)
    rows = _summed(store, asked, usage_records.join(entries, settled), {"quantity": e.quantity, "amount": -e.amount})
    by_line = "line" in asked.by
    return [Cost(_begins(asked, row), _group(asked, row), row.quantity if by_line else None, row.amount) for row in rows]


def _summed(
    store: Store, asked: Question, source: sa.FromClause, summed: Mapping[str, sa.ColumnElement[int]]
) -> Sequence[sa.Row[Any]]:
    if not asked.start < asked.end or not {*asked.by, *asked.only} <= _COLUMNS.keys():
        raise InvalidRequest(f"usage is asked for from a start to a later end, by {', '.join(_COLUMNS)}")
    if asked.width_s and (asked.end - asked.start) / asked.width_s > MOST_BUCKETS:
        raise InvalidRequest(f"more than {MOST_BUCKETS} buckets: ask for wider ones or for less time", param="bucket_width")
    c = usage_records.c
    if "user_id" in {*asked.by, *asked.only}:
        source = source.outerjoin(api_keys, api_keys.c.id == c.key_id)
    second, width = sa.cast(sa.func.floor(c.booked_at), sa.BigInteger), sa.literal_column(str(_width(asked)), sa.BigInteger)
    bucket = (second // width).label("bucket")
    groups = [_COLUMNS[name].label(f"by_{name}") for name in asked.by]
    totals = [sa.cast(sa.func.sum(column), sa.BigInteger).label(name) for name, column in summed.items()]
    query = sa.select(bucket, *groups, *totals).select_from(source)
    query = query.where(c.booked_at >= float(asked.start), c.booked_at < float(asked.end))
    if asked.organization is not None:
        query = query.where(c.organization == asked.organization)
    for name, values in asked.only.items():
        query = query.where(_COLUMNS[name].in_(sorted(values)))
    with store.read() as connection:
        return connection.execute(query.group_by(bucket, *groups).order_by(bucket, *groups)).all()


def _width(asked: Question) -> int:
    return asked.width_s or _FOREVER


def _begins(asked: Question, row: Any) -> int:
    return max(int(asked.start), int(row.bucket) * _width(asked))


def _group(asked: Question, row: Any) -> dict[str, str | None]:
    return {name: getattr(row, f"by_{name}") for name in asked.by}
