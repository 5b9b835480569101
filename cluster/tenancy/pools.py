"""The part of limits that gateways share: buckets and slots in the store, drawn from in small leases (`shares.py`).

One transaction serves all that a gateway asks for at a time; it locks the rows of those buckets and no others, in one order. The
clock is the database's, one for all gateways; should it jump, see `gcra.py`. What is drawn is spent for everybody else, until the
holder gives it back. Units of a gateway that died leak as if it had spent them; its slots for streams come free after `SLOT_S`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Connection, Integer, String, Table

from cluster.store import Store, metadata
from cluster.tenancy import gcra
from cluster.tenancy.counts import STREAM_WAIT_US, Kind
from cluster.tenancy.gcra import Bucket, Rate

SLOT_S = 10.0
"""How long a gateway that says nothing keeps its slots for streams."""

rate_pools = Table(
    "rate_pools",
    metadata,
    Column("name", String(300), primary_key=True),
    Column("debt", BigInteger, nullable=False),  # a `gcra.Bucket`; for streams only the row matters, as a lock
    Column("at", BigInteger, nullable=False),  # microseconds since the epoch, here and below
)

stream_leases = Table(
    "stream_leases",
    metadata,
    Column("name", String(300), primary_key=True),
    Column("holder", String(32), primary_key=True),
    Column("held", Integer, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Ask:
    """What a gateway wants of one bucket: as much as there is up to `most`, but not less than `least`. Before that it gives `back`
    units (negative: it spent so many beyond). Of streams it says how many slots it `holds` and keeps."""

    kind: Kind
    name: str
    rate: Rate  # for streams: `limit` at once
    least: int = 0
    most: int = 0
    back: int = 0
    holds: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    granted: int
    wait_us: int  # until `least` can be had; 0 when it was
    room: int  # left for everybody
    reset_us: int


class Pools(Protocol):
    def draw(self, holder: str, asks: Sequence[Ask]) -> list[Answer]:
        """Answers in the order of `asks`, each for another bucket. Blocks. Takes effect as a whole or not at all."""
        ...


def draw_rate(ask: Ask, bucket: Bucket, now: int) -> tuple[Bucket, Answer]:
    """The bucket afterwards, and what the gateway got."""
    rate = ask.rate
    bucket = gcra.spend(rate, bucket, now, -ask.back)
    wait = gcra.wait_us(rate, bucket, now, ask.least) if ask.most else 0
    granted = 0 if wait else min(ask.most, gcra.room(rate, bucket, now))
    bucket = gcra.spend(rate, bucket, now, granted)
    return bucket, Answer(granted, wait, gcra.room(rate, bucket, now), gcra.empty_in_us(rate, bucket, now))


def draw_slots(ask: Ask, others: int) -> Answer:
    """`others`: slots that other gateways hold."""
    free = max(0, ask.rate.limit - others - ask.holds)
    granted = min(ask.most, free) if free >= ask.least else 0
    return Answer(granted, STREAM_WAIT_US if free < ask.least else 0, free - granted, 0)


class StoredPools:
    """Pools in the store."""

    def __init__(self, store: Store, clock_us: Callable[[Connection], int] | None = None) -> None:
        self._store = store
        self._clock = clock_us or _database_time

    def draw(self, holder: str, asks: Sequence[Ask]) -> list[Answer]:
        with self._store.begin() as connection:
            buckets = self._lock(connection, sorted({ask.name for ask in asks}))
            now = self._clock(connection)
            answers, changed = [], []
            for ask in asks:
                if ask.kind == "streams":
                    answers.append(self._slots(connection, holder, ask, now))
                else:
                    bucket, answer = draw_rate(ask, buckets[ask.name], now)
                    answers.append(answer)
                    changed.append({"of": ask.name, "debt": bucket.debt, "at": bucket.at})
            if changed:
                update = rate_pools.update().where(rate_pools.c.name == sa.bindparam("of"))
                connection.execute(update.values(debt=sa.bindparam("debt"), at=sa.bindparam("at")), changed)
        return answers

    def _lock(self, connection: Connection, names: list[str]) -> dict[str, Bucket]:
        """The buckets, which nobody else touches until the end of the transaction; new ones are made."""
        found = _locked(connection, names)
        if missing := [{"name": name, "debt": 0, "at": 0} for name in names if name not in found]:
            connection.execute(_insert(connection).values(missing).on_conflict_do_nothing())
            found = _locked(connection, names)
        return found

    def _slots(self, connection: Connection, holder: str, ask: Ask, now: int) -> Answer:
        table = stream_leases.c
        connection.execute(
            stream_leases.delete().where(table.name == ask.name, sa.or_(table.expires_at <= now, table.holder == holder))
        )
        others = connection.scalar(sa.select(sa.func.coalesce(sa.func.sum(table.held), 0)).where(table.name == ask.name))
        answer = draw_slots(ask, int(others or 0))
        if held := ask.holds + answer.granted:
            row = {"name": ask.name, "holder": holder, "held": held, "expires_at": now + round(SLOT_S * 1e6)}
            connection.execute(stream_leases.insert().values(row))
        return answer


def _locked(connection: Connection, names: list[str]) -> dict[str, Bucket]:
    query = sa.select(rate_pools).where(rate_pools.c.name.in_(names)).order_by(rate_pools.c.name).with_for_update()
    return {
        row.name: Bucket(row.debt, row.at) for row in connection.execute(query)
    }  # SQLite has one writer, and ignores FOR UPDATE


def _insert(connection: Connection) -> Any:
    """Both dialects have the same words for it, and SQLAlchemy none."""
    from sqlalchemy.dialects import postgresql, sqlite

    return (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(rate_pools)


def _database_time(connection: Connection) -> int:
    if connection.dialect.name != "postgresql":
        return time.time_ns() // 1000
    now: Any = connection.scalar(sa.text("SELECT extract(epoch FROM clock_timestamp()) * 1000000"))
    return int(now)
