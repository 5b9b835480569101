from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from cluster.errors import BudgetExceeded, Conflict, InvalidRequest, LedgerUnavailable, NotFound
from cluster.store import Store
from cluster.tenancy import journal, journal_tables
from cluster.tenancy.books import Operation, Progress, Reserve, Settle, Settled
from cluster.tenancy.budgets import Budgets
from cluster.tenancy.group_commit import GroupCommit
from cluster.tenancy.ledger import Ledger, Result, reservation
from cluster.tenancy.metered import Metered
from cluster.tenancy.reconcile import problems
from cluster.types import Usage
from tests.cluster.tenancy.accounts import PRICES, caller
from tests.cluster.tenancy.conftest import Clock


@pytest.fixture
def priced(ledger: Ledger) -> Ledger:
    ledger.prices.publish("default", PRICES)
    return ledger


def test_a_request_is_reserved_and_settled_for_what_it_used(priced: Ledger, either_store: Store, clock: Clock) -> None:
    limits = Budgets(either_store)
    priced.reserve(caller(), "r1", "chat", Metered(input_tokens=100, output_tokens=50))
    assert limits.balance("project", "web", clock()).held >= 450
    assert priced.settle("r1", Usage(100, 10, cached_tokens=40), "finished") == Settled(60 * 2 + 40 + 10 * 5, first=True)
    after = limits.balance("key", "k1", clock())
    assert (after.held, after.spent_day, after.spent_month, after.spent) == (0, 210, 210, 210)
    assert problems(either_store) == []


@pytest.mark.parametrize("outcome", ["finished", "length", "cancelled", "client_gone", "replica_lost", "failed"])
def test_whatever_ends_a_request_settles_it_once(priced: Ledger, either_store: Store, outcome: str) -> None:
    priced.reserve(caller(), "r1", "chat", 1000)
    priced.progress("r1", Usage(10, 1))
    assert priced.settle("r1", Usage(10, 3), outcome) == Settled(35, first=True)  # type: ignore[arg-type]
    assert priced.settle("r1", Usage(10, 99), "lost") == Settled(35, first=False)
    assert problems(either_store) == []


def test_who_died_is_settled_at_the_last_progress(priced: Ledger, either_store: Store, clock: Clock) -> None:
    priced.reserve(caller(), "r1", "chat", 1000)
    priced.reserve(caller(), "r2", "chat", 1000)
    priced.progress("r1", Usage(10, 7))
    priced.progress("r1", Usage(10, 3))  # a report that was overtaken
    other, elapsed = Ledger(either_store, clock, monotonic=(monotonic := Clock())), priced.lease_s
    assert other.reap() == 0
    clock.now += 3600  # a clock that jumps ends nothing
    monotonic.now += elapsed - 0.001
    assert other.reap() == 0
    monotonic.now += 0.001
    assert other.reap() == 2
    assert priced.settle("r1", Usage(10, 9), "finished") == Settled(55, first=False)
    assert priced.settle("r2", None, "finished") == Settled(0, first=False)
    with pytest.raises(Conflict, match="must stop"):
        priced.progress("r1", Usage(10, 8))
    assert problems(either_store) == []


def test_who_renews_keeps_its_reservations(priced: Ledger, either_store: Store, clock: Clock) -> None:
    priced.reserve(caller(), "r1", "chat", 10)
    other = Ledger(either_store, clock, monotonic=clock)
    for _ in range(5):
        assert other.reap() == 0
        clock.now += priced.lease_s
        priced.renew()
    clock.now += priced.longest_s
    priced.renew()
    assert other.reap() == 1, "what is open for longer than any request was forgotten"


def test_a_request_that_is_unknown_or_known_is_refused(priced: Ledger) -> None:
    with pytest.raises(NotFound):
        priced.settle("never", None, "finished")
    with pytest.raises(NotFound):
        priced.progress("never", Metered())
    priced.reserve(caller(), "r1", "chat", 10)
    with pytest.raises(Conflict):
        priced.reserve(caller("other", "k2", "umbrella"), "r1", "chat", 10)
    priced.settle("r1", None, "cancelled")
    with pytest.raises(Conflict):
        priced.reserve(caller(), "r1", "chat", 10)
    with pytest.raises(InvalidRequest):
        priced.reserve(caller(), "r2", "chat", -1)


@pytest.mark.parametrize(
    ("kind", "name", "period"), [("project", "web", "day"), ("organization", "acme", "month"), ("key", "k1", "total")]
)
def test_a_budget_holds_against_what_is_reserved(priced: Ledger, either_store: Store, kind: str, name: str, period: str) -> None:
    Budgets(either_store).set(kind, name, period, 100)  # type: ignore[arg-type]
    priced.reserve(caller(), "r1", "chat", 60)
    with pytest.raises(BudgetExceeded, match=f"of this {kind}"):
        priced.reserve(caller(), "r2", "chat", 41)
    priced.reserve(caller(), "r3", "chat", 40)
    priced.settle("r1", Usage(0, 2), "finished")  # 10 of 60
    priced.reserve(caller(), "r4", "chat", 50)
    priced.reserve(caller("api", "k2", "umbrella"), "r5", "chat", 5000)
    assert problems(either_store) == []


def test_a_day_gives_its_budget_back_and_a_clock_that_goes_back_does_not(priced: Ledger, either_store: Store, clock: Clock) -> None:
    Budgets(either_store).set("project", "web", "day", 100)
    spend(priced, "r1", 20)
    clock.now += 86_400
    spend(priced, "r2", 20)
    clock.now -= 86_400
    with pytest.raises(BudgetExceeded):
        spend(priced, "r3", 1)
    assert problems(either_store) == []


def spend(ledger: Ledger, request_id: str, tokens: int) -> None:
    ledger.reserve(caller(), request_id, "chat", Metered(output_tokens=tokens))
    ledger.settle(request_id, Metered(output_tokens=tokens), "finished")


def test_sixty_four_callers_at_once_never_pass_a_budget(priced: Ledger, either_store: Store, clock: Clock) -> None:
    """Two gateways, each with its own ledger; every caller reserves 50 and spends 35."""
    limit, worst = 2000, 50
    Budgets(either_store).set("project", "web", "month", limit)
    gateways = [priced, Ledger(either_store, clock)]
    start, refused = threading.Barrier(64), []

    def call(number: int) -> None:
        start.wait()
        for again in range(2):
            try:
                gateways[number % 2].reserve(caller(), f"r{number}-{again}", "chat", worst)
            except BudgetExceeded:
                refused.append(number)
            else:
                gateways[number % 2].settle(f"r{number}-{again}", Usage(0, 7), "finished")

    with ThreadPoolExecutor(64) as threads:
        list(threads.map(call, range(64)))
    balance = Budgets(either_store).balance("project", "web", clock())
    assert limit - worst < balance.spent_month <= limit
    assert balance.held == 0
    assert len(refused) == 128 - balance.spent_month // 35
    assert problems(either_store) == []


async def test_callers_of_one_server_share_transactions_and_one_refusal_is_no_others(priced: Ledger, either_store: Store) -> None:
    Budgets(either_store).set("key", "poor", "total", 1)
    sizes = []

    def applied(operations: list[Operation]) -> list[Result]:
        sizes.append(len(operations))
        return priced.apply(operations)

    group = GroupCommit(applied)  # type: ignore[arg-type]

    async def call(number: int) -> Settled | None:
        key = "poor" if number % 10 == 0 else "rich"
        await group.do(Reserve(f"r{number}", "acme", "web", key, "chat", 20))
        await group.do(Progress(f"r{number}", Metered(output_tokens=1)))
        return await group.do(Settle(f"r{number}", Metered(output_tokens=2), "finished"))

    results = await asyncio.gather(*map(call, range(60)), return_exceptions=True)
    await group.close()
    refused = [number for number, result in enumerate(results) if isinstance(result, BudgetExceeded)]
    assert refused == [0, 10, 20, 30, 40, 50]
    assert [result for result in results if isinstance(result, Settled)] == [Settled(10, first=True)] * 54
    assert len(sizes) < 30, f"{sum(sizes)} operations took {len(sizes)} transactions"
    assert problems(either_store) == []


async def test_a_caller_who_leaves_harms_no_other(priced: Ledger, either_store: Store) -> None:
    group = GroupCommit(priced.apply)
    leaving = [asyncio.ensure_future(group.do(Reserve(f"r{n}", "acme", "web", "k1", "chat", 1))) for n in range(10)]
    await asyncio.sleep(0)
    for task in leaving[::2]:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    settled = await asyncio.gather(*(group.do(Settle(f"r{n}", Metered(), "cancelled")) for n in range(10)))
    await group.close()
    assert settled == [Settled(0, first=True)] * 10
    assert problems(either_store) == []


def test_two_writers_of_the_same_request_book_it_once(priced: Ledger, either_store: Store, clock: Clock) -> None:
    """Different organizations lock different rows, so only the unique names of postings stand between them."""
    start, outcomes = threading.Barrier(2), []

    def reserve(organization: str) -> None:
        ledger = Ledger(either_store, clock)
        ledger.reserve(
            caller(organization=organization, project=organization, key=organization), f"first-{organization}", "chat", 1
        )
        for number in range(20):
            start.wait()
            try:
                ledger.reserve(caller(organization, organization, organization), f"r{number}", "chat", 1)
                outcomes.append("booked")
            except Conflict:
                outcomes.append("refused")

    threads = [threading.Thread(target=reserve, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["booked"] * 20 + ["refused"] * 20
    assert problems(either_store) == []


@pytest.mark.parametrize("table", journal_tables.APPEND_ONLY)
def test_facts_can_neither_be_changed_nor_removed(priced: Ledger, either_store: Store, table: str) -> None:
    from cluster.tenancy.credits import Credits
    from cluster.tenancy.invoices import Invoices

    priced.prices.subscribe("acme", "default")
    spend(priced, "r1", 3)
    Credits(either_store, priced._clock).grant("acme", 5, "welcome")
    priced._clock.now += 40 * 86_400  # type: ignore[attr-defined]
    Invoices(either_store, priced._clock).issue("acme", "2026-11")
    of = journal_tables.entries.metadata.tables[table]
    first = next(column for column in of.c if isinstance(column.type, sa.String))
    for statement in (of.update().values({first.name: "x"}), of.delete()):
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), either_store.begin() as connection:
            connection.execute(statement)
    assert problems(either_store) == []


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("INSERT INTO entries VALUES ('acme', 2, 99, 'revenue', 1, NULL, NULL, NULL, NULL)", "sums to 1"),
        ("INSERT INTO postings VALUES ('acme', 9, 'rX', 'settle', 'web', 1, 1.0)", "numbered up to 9"),
        ("DELETE FROM holds", "not settled and not open"),
        ("UPDATE balances SET spent = spent + 1 WHERE scope = 'project:web'", "usage of projects"),
        ("UPDATE balances SET held = held - 1 WHERE scope = 'key:k1'", "reservations of keys"),
        ("UPDATE balances SET seq = seq + 1", "counts"),
        ("INSERT INTO postings SELECT 'acme', 4, 'r1', 'twice', 'web', 1, 1.0", "numbered up to 4"),
    ],
)
def test_a_planted_error_is_found(priced: Ledger, either_store: Store, statement: str, found: str) -> None:
    spend(priced, "r1", 3)
    priced.reserve(caller(), "r2", "chat", 10)
    assert problems(either_store) == []
    with either_store.begin() as connection:
        connection.exec_driver_sql(statement)
    assert any(found in problem for problem in problems(either_store)), problems(either_store)


def test_a_store_that_is_gone_refuses_and_serves_again(
    priced: Ledger, either_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise sa.exc.OperationalError("INSERT", {}, Exception("the connection is gone"))

    with monkeypatch.context() as patched:
        patched.setattr(journal, "write", gone)
        with pytest.raises(LedgerUnavailable):
            priced.reserve(caller(), "r1", "chat", 10)
    spend(priced, "r1", 3)
    assert problems(either_store) == []


def test_after_a_failed_write_nothing_is_booked_any_more(priced: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise sa.exc.OperationalError("COMMIT", {}, Exception("disk I/O error"))

    with monkeypatch.context() as patched:
        patched.setattr(journal, "write", broken)
        with pytest.raises(LedgerUnavailable):
            priced.reserve(caller(), "r1", "chat", 10)
    with pytest.raises(LedgerUnavailable, match="stopped"):
        priced.reserve(caller(), "r2", "chat", 10)


def test_a_known_request_in_a_group_is_refused_alone(priced: Ledger, either_store: Store) -> None:
    priced.reserve(caller(), "r1", "chat", 1000)
    results = priced.apply([reservation(caller(), name, "chat", 1000) for name in ("r0", "r1", "r2")])
    assert [type(result) for result in results] == [type(None), Conflict, type(None)]
    assert {priced.settle(name, Usage(10, 1), "finished").first for name in ("r0", "r1", "r2")} == {True}
    assert problems(either_store) == []
