"""Usage and costs over time: sums of usage records in buckets, by whatever is asked for. The source of usage pages and commands."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import sqlalchemy as sa

from cluster.errors import InvalidRequest
from cluster.store import Store
from cluster.tenancy.journal import metered_of, usage_records
from cluster.tenancy.metered import METERS, Metered

By = Literal["project", "key_id", "model", "outcome"]

MOST_BUCKETS = 1500


@dataclass(frozen=True, slots=True)
class Sum:
    """Everything that was booked from `begins` on until the bucket's end, for the group's values. `amount` is in micro-units."""

    begins: int
    group: Mapping[str, str]
    metered: Metered
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


def usage(store: Store, asked: Question) -> list[Sum]:
    """Sums by bucket and group, in this order; buckets without any usage are left out. Raises InvalidRequest."""
    if not asked.start < asked.end or not set(asked.by) <= set(get_args(By)):
        raise InvalidRequest("usage is asked for from a start to a later end, by project, key_id, model or outcome")
    width = asked.width_s or int(asked.end - asked.start) + 1
    if (asked.end - asked.start) / width > MOST_BUCKETS:
        raise InvalidRequest(f"more than {MOST_BUCKETS} buckets: ask for wider ones or for less time", param="bucket_width")
    c = usage_records.c
    bucket = sa.cast(sa.func.floor((c.booked_at - asked.start) / width), sa.Integer)
    group = [bucket.label("bucket"), *(c[name] for name in asked.by)]
    totals = [sa.cast(sa.func.sum(c[name]), sa.BigInteger).label(name) for name in (*METERS, "amount")]
    query = sa.select(*group, *totals).where(c.booked_at >= asked.start, c.booked_at < asked.end)
    if asked.organization is not None:
        query = query.where(c.organization == asked.organization)
    for name, values in asked.only.items():
        query = query.where(c[name].in_(sorted(values)))
    with store.read() as connection:
        rows = connection.execute(query.group_by(*group).order_by(*group)).all()
    start = int(asked.start)
    return [
        Sum(start + row.bucket * width, {name: getattr(row, name) for name in asked.by}, metered_of(row), row.amount)
        for row in rows
    ]
