from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa

from cluster.errors import BudgetExceeded, Conflict, InvalidRequest, LedgerUnavailable, PlatformError, ReplicaLost
from cluster.store import Store
from cluster.tenancy import journal_tables
from cluster.tenancy.books import Operation
from cluster.tenancy.budgets import Budgets
from cluster.tenancy.group_commit import GroupCommit
from cluster.tenancy.ledger import Ledger, Result
from cluster.tenancy.metered import Metered
from cluster.tenancy.metering import Metering, Running
from cluster.tenancy.reconcile import problems
from cluster.types import Usage
from tests.cluster.tenancy.accounts import PRICES, caller
from tests.cluster.tenancy.conftest import Clock

BOUND = Metered(input_tokens=10, output_tokens=100)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(f"sqlite:///{tmp_path}/mmaas.db")
    store.migrate()
    return store


@pytest.fixture
async def metering(store: Store, clock: Clock) -> AsyncIterator[Metering]:
    ledger = Ledger(store, clock)
    ledger.prices.publish("default", PRICES)
    metering = Metering(ledger, clock)
    yield metering
    await metering.close()
    assert problems(store) == []
    store.close()


def outcomes(store: Store) -> dict[str, tuple[str, int]]:
    c = journal_tables.usage_records.c
    with store.read() as connection:
        return {row[0]: (row[1], row[2]) for row in connection.execute(sa.select(c.request_id, c.outcome, c.amount))}


async def test_a_request_is_settled_for_what_it_used(metering: Metering, store: Store) -> None:
    async with metering.request(caller(), "r1", "chat", BOUND) as running:
        running.used(Usage(10, 5))
        running.outcome = "length"
    assert running.settled
    assert running.settled.amount == 45
    assert outcomes(store) == {"r1": ("length", 45)}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (asyncio.CancelledError(), "client_gone"),
        (ReplicaLost("gone"), "replica_lost"),
        (RuntimeError("ours"), "failed"),
        (InvalidRequest("theirs"), "cancelled"),
    ],
)
async def test_however_it_ends_it_is_settled(metering: Metering, store: Store, error: BaseException, outcome: str) -> None:
    async def call() -> None:
        async with metering.request(caller(), "r1", "chat", BOUND) as running:
            running.used(Usage(10, 5))
            raise error

    with pytest.raises(type(error)):
        await call()
    assert outcomes(store) == {"r1": (outcome, 45)}


async def test_without_room_in_the_budget_nothing_is_run(metering: Metering, store: Store) -> None:
    Budgets(store).set("project", "web", "day", 100)
    with pytest.raises(BudgetExceeded):
        async with metering.request(caller(), "r1", "chat", BOUND):
            raise AssertionError("this must not run")
    assert outcomes(store) == {}


async def test_who_leaves_at_any_moment_leaves_nothing_open(metering: Metering, store: Store) -> None:
    async def call(number: int) -> None:
        async with metering.request(caller(), f"r{number}", "chat", BOUND) as running:
            for tokens in range(1, 100):
                running.used(Usage(10, tokens))
                await asyncio.sleep(0.001)

    for number in range(12):
        task = asyncio.ensure_future(call(number))
        await asyncio.sleep(0.003 * number)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert num_open(store) == 0
    assert {outcome for outcome, _ in outcomes(store).values()} <= {"client_gone"}


async def test_who_is_cancelled_over_and_over_leaves_nothing_open(metering: Metering, store: Store) -> None:
    """Also while it reserves, settles, or waits for either: a gateway that stops cancels what was cancelled already."""

    async def call(number: int) -> None:
        async with metering.request(caller(), f"r{number}", "chat", BOUND) as running:
            for tokens in range(1, 100, 33):
                running.used(Usage(10, tokens))
                await asyncio.sleep(0.001)

    for number in range(30):
        task = asyncio.ensure_future(call(number))
        await asyncio.sleep(0.001 * number)
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.gather(task, return_exceptions=True)
    await metering.close()
    assert num_open(store) == 0
    assert {outcome for outcome, _ in outcomes(store).values()} <= {"client_gone", "finished"}


def num_open(store: Store) -> int:
    with store.read() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(journal_tables.holds)) or 0


class Failing(Ledger):
    """Says of a number of transactions that they failed; of every other one after it was written."""

    failures = 0

    def apply(self, operations: Sequence[Operation], now: float | None = None) -> list[Result]:
        if self.failures <= 0:
            return super().apply(operations, now)
        self.failures -= 1
        if self.failures % 2:
            super().apply(operations, now)
        raise LedgerUnavailable("the store is away")


async def test_what_could_not_be_written_is_settled_later(store: Store, clock: Clock) -> None:
    ledger = Failing(store, clock)
    ledger.prices.publish("default", PRICES)
    group = GroupCommit(ledger.apply, again_s=(0.01, 0.05))
    metering = Metering(ledger, clock, group)
    async with metering.request(caller(), "r1", "chat", BOUND) as running:
        running.used(Usage(10, 5))
        ledger.failures = 5
    assert running.settled is None
    ledger.failures += 2
    with pytest.raises(LedgerUnavailable):
        async with metering.request(caller(), "r2", "chat", BOUND):
            raise AssertionError("this must not run")
    for _ in range(500):
        await asyncio.sleep(0.01)
        if not num_open(store) and ledger.failures <= 0:
            break
    assert outcomes(store)["r1"] == ("finished", 45)
    assert outcomes(store).get("r2", ("failed", 0)) == ("failed", 0)
    await metering.close()
    assert problems(store) == []
    store.close()


async def test_what_is_written_along_comes_with_the_settlement_or_not_at_all(metering: Metering, store: Store) -> None:
    def along(connection: sa.Connection) -> None:
        connection.execute(journal_tables.owners.insert().values(owner="along", beat=1))

    def broken(connection: sa.Connection) -> None:
        along(connection)
        raise ValueError("it can't be written")

    left: list[Running] = []
    async with metering.request(caller(), "r1", "chat", BOUND, later=left.append) as running:
        running.used(Usage(10, 5))
    assert num_open(store) == 1
    with pytest.raises(PlatformError):
        await left[0].settle(broken)
    assert (num_open(store), owners(store)) == (1, 1)
    await left[0].settle(along)
    assert (num_open(store), owners(store)) == (0, 2)
    assert outcomes(store) == {"r1": ("finished", 45)}


def owners(store: Store) -> int:
    with store.read() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(journal_tables.owners)) or 0


async def test_progress_is_durable_after_so_many_tokens_or_so_long(metering: Metering, store: Store, clock: Clock) -> None:
    async def kept() -> int | None:
        await asyncio.sleep(0.05)
        with store.read() as connection:
            return connection.scalar(sa.select(journal_tables.holds.c.output_tokens))

    async with metering.request(caller(), "r1", "chat", BOUND) as running:
        running.used(Usage(10, 31))
        assert await kept() == 0
        running.used(Usage(10, 32))
        assert await kept() == 32
        running.used(Usage(10, 40))
        assert await kept() == 32
        clock.now += 1
        running.used(Usage(10, 41))
        assert await kept() == 41


async def test_who_was_given_up_must_stop_and_is_not_billed_again(metering: Metering, store: Store, clock: Clock) -> None:
    async def call() -> None:
        async with metering.request(caller(), "r1", "chat", BOUND) as running:
            running.used(Usage(10, 40))
            await asyncio.sleep(0.05)
            other = Ledger(store, clock, monotonic=clock)
            other.reap()
            clock.now += 60
            assert other.reap() == 1
            for tokens in range(72, 200, 32):
                running.used(Usage(10, tokens))
                await asyncio.sleep(0.05)

    with pytest.raises(Conflict, match="must stop"):
        await call()
    assert outcomes(store) == {"r1": ("lost", 220)}


async def test_the_heartbeat_keeps_the_living_and_settles_the_dead(store: Store, clock: Clock) -> None:
    dead, alive = Ledger(store, clock), Ledger(store, clock, lease_s=0.1)
    dead.reserve(caller(), "dead", "chat", 5)
    metering = Metering(alive)
    async with metering.request(caller(), "living", "chat", 5):
        while "dead" not in outcomes(store):
            await asyncio.to_thread(alive.reap)
            await asyncio.sleep(0.03)
        assert "living" not in outcomes(store)
    await metering.close()
    assert outcomes(store) == {"dead": ("lost", 0), "living": ("finished", 0)}
    store.close()
