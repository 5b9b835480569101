from __future__ import annotations

import hashlib
import threading
from collections import Counter

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.errors import Conflict, InProgress, InvalidRequest, KeyReused, Overloaded, PlatformError
from cluster.store import Store
from cluster.tenancy.idempotency import (
    KEEP_S,
    LEASE_S,
    Answer,
    Bounds,
    Idempotency,
    Replay,
    Run,
    idempotency,
    idempotency_totals,
)
from tests.cluster.tenancy.conftest import Clock

ANSWER = Answer(200, (("content-type", "application/json"),), b'{"id": 1}\x00\xff')
ASKED, OTHER = hashlib.sha256(b"asked").digest(), hashlib.sha256(b"other").digest()


@pytest.fixture
def store(migrated: Store) -> Store:
    empty(migrated)
    return migrated


def empty(store: Store) -> None:
    with store.begin() as connection:
        connection.execute(idempotency.delete())
        connection.execute(idempotency_totals.delete())


@pytest.fixture
def keys(store: Store, clock: Clock) -> Idempotency:
    return Idempotency(store, clock=clock)


def begun(keys: Idempotency, tenant: str = "acme", key: str = "k", request: bytes = ASKED) -> Run:
    run = keys.begin(tenant, key, request)
    assert isinstance(run, Run)
    return run


def test_the_answer_comes_again_byte_for_byte(keys: Idempotency) -> None:
    assert keys.finish(begun(keys), ANSWER)
    assert keys.begin("acme", "k", ASKED) == Replay(ANSWER)
    assert keys.begin("acme", "k", ASKED) == Replay(ANSWER)


def test_while_it_runs_others_wait(keys: Idempotency) -> None:
    begun(keys)
    with pytest.raises(InProgress) as error:
        keys.begin("acme", "k", ASKED)
    assert (error.value.status, error.value.retry_after_s) == (409, 1.0)


def test_another_request_with_the_key_is_refused_while_it_runs_and_after(keys: Idempotency) -> None:
    run = begun(keys)
    with pytest.raises(KeyReused):
        keys.begin("acme", "k", OTHER)
    keys.finish(run, ANSWER)
    with pytest.raises(KeyReused) as error:
        keys.begin("acme", "k", OTHER)
    assert error.value.status == 422


def test_tenants_do_not_share_keys(keys: Idempotency) -> None:
    keys.finish(begun(keys), ANSWER)
    begun(keys, tenant="other", request=OTHER)


def test_a_released_key_runs_again_also_with_another_request(keys: Idempotency) -> None:
    keys.release(begun(keys))
    begun(keys, request=OTHER)


def test_a_lease_that_ended_is_taken_over_and_the_first_run_stores_nothing(keys: Idempotency, clock: Clock) -> None:
    first = begun(keys)
    clock.now += LEASE_S - 1
    with pytest.raises(InProgress):
        keys.begin("acme", "k", ASKED)
    clock.now += 1
    second = begun(keys)
    assert second.took_over
    assert not keys.finish(first, Answer(200, (), b"late"))
    keys.release(first)
    keys.renew([first])
    assert keys.finish(second, ANSWER)
    assert keys.begin("acme", "k", ASKED) == Replay(ANSWER)


def test_a_lease_that_is_renewed_is_not_taken_over(keys: Idempotency, clock: Clock) -> None:
    run = begun(keys)
    for _ in range(5):
        clock.now += LEASE_S - 1
        keys.renew([run])
        with pytest.raises(InProgress):
            keys.begin("acme", "k", ASKED)


def test_a_run_of_more_than_a_day_still_has_its_key(keys: Idempotency, clock: Clock) -> None:
    run = begun(keys)
    for _ in range(3):
        clock.now += KEEP_S / 2
        keys.renew([run])
    assert not keys.purge()
    with pytest.raises(InProgress):
        keys.begin("acme", "k", ASKED)
    assert keys.finish(run, ANSWER)


def test_a_day_later_the_key_is_new_and_purging_forgets_it(keys: Idempotency, clock: Clock, store: Store) -> None:
    keys.finish(begun(keys), ANSWER)
    keys.finish(begun(keys, key="other"), ANSWER)
    clock.now += KEEP_S - 1
    assert keys.begin("acme", "k", ASKED) == Replay(ANSWER)
    assert keys.purge() == 0
    clock.now += 1
    keys.release(begun(keys, request=OTHER))
    assert keys.purge() == 1
    assert totals(store) == {"acme": (0, 0)}


@pytest.mark.parametrize("key", ["", "x" * 256, "ü", "a\nb", "\x7f"])
def test_what_can_be_no_key_is_refused(keys: Idempotency, key: str) -> None:
    with pytest.raises(InvalidRequest):
        keys.begin("acme", key, ASKED)


def test_an_answer_that_is_too_long_is_not_kept_but_does_not_run_again(store: Store, clock: Clock) -> None:
    keys = Idempotency(store, Bounds(answer_bytes=4), clock)
    keys.finish(begun(keys), ANSWER)
    keys.finish(begun(keys, key="none"), None)
    for key in ("k", "none"):
        with pytest.raises(Conflict, match="no longer kept"):
            keys.begin("acme", key, ASKED)


def test_the_oldest_answers_of_a_tenant_give_way_and_nobody_elses(store: Store, clock: Clock) -> None:
    keys = Idempotency(store, Bounds(tenant_bytes=25), clock)
    keys.finish(begun(keys, tenant="other"), ANSWER)
    for key in ("a", "b", "c"):
        clock.now += 1
        keys.finish(begun(keys, key=key), ANSWER)
    with pytest.raises(Conflict):
        keys.begin("acme", "a", ASKED)
    assert keys.begin("acme", "b", ASKED) == keys.begin("acme", "c", ASKED) == keys.begin("other", "k", ASKED) == Replay(ANSWER)
    assert totals(store) == {"acme": (3, 22), "other": (1, 11)}


def test_a_tenant_can_not_fill_the_table(store: Store, clock: Clock) -> None:
    keys = Idempotency(store, Bounds(tenant_rows=2), clock)
    for key in ("a", "b"):
        keys.finish(begun(keys, key=key), ANSWER)
    with pytest.raises(Overloaded):
        keys.begin("acme", "c", ASKED)
    begun(keys, tenant="other")
    clock.now += KEEP_S
    begun(keys, key="a")


def test_of_fifty_that_begin_at_once_one_runs(keys: Idempotency) -> None:
    outcomes: Counter[str] = Counter()

    def begin() -> None:
        try:
            outcomes[type(keys.begin("acme", "k", ASKED)).__name__] += 1
        except PlatformError as error:
            outcomes[type(error).__name__] += 1

    threads = [threading.Thread(target=begin) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {"Run": 1, "InProgress": 49}


def totals(store: Store) -> dict[str, tuple[int, int]]:
    with store.read() as connection:
        return {row.tenant: (row.rows, row.bytes) for row in connection.execute(sa.select(idempotency_totals))}


class KeysInUse(RuleBasedStateMachine):
    """Two gateways, two tenants, three keys, a clock: against a dictionary."""

    store: Store

    def __init__(self) -> None:
        super().__init__()
        empty(self.store)
        self.clock = Clock()
        self.keys = Idempotency(self.store, Bounds(answer_bytes=20, tenant_bytes=30, tenant_rows=100), self.clock)
        self.runs: list[Run] = []
        self.last: dict[tuple[str, str], tuple[bytes, Run, float]] = {}  # who runs, until when
        self.done: dict[tuple[str, str], tuple[bytes, bytes, float]] = {}

    @rule(tenant=st.sampled_from(["a", "b"]), key=st.sampled_from(["x", "y", "z"]), request=st.sampled_from([ASKED, OTHER]))
    def begin(self, tenant: str, key: str, request: bytes) -> None:
        now, place = self.clock.now, (tenant, key)
        done, running = self.done.get(place), self.last.get(place)
        if done and done[2] <= now:
            del self.done[place]
            done = None
        try:
            outcome = self.keys.begin(tenant, key, request)
        except KeyReused:
            assert (done or running or (request,))[0] != request
        except InProgress:
            assert running
            assert running[2] > now
        except Conflict:
            assert done
            assert done[0] == request
        else:
            if isinstance(outcome, Replay):
                assert done
                assert (done[0], done[1]) == (request, outcome.answer.body)
            else:
                assert done is None
                assert running is None or running[2] <= now, "two run at once"
                self.runs.append(outcome)
                self.last[place] = request, outcome, now + LEASE_S

    @rule(data=st.data(), size=st.integers(0, 25))
    def finish(self, data: st.DataObject, size: int) -> None:
        if not self.runs:
            return
        run = self.runs.pop(data.draw(st.integers(0, len(self.runs) - 1)))
        [(place, held)] = [item for item in self.last.items() if item[1][1] == run] or [(None, None)]
        stored = self.keys.finish(run, Answer(200, (), b"x" * size))
        assert stored == (held is not None)
        if place and held:
            self.done[place] = held[0], b"x" * size, self.clock.now + KEEP_S
            del self.last[place]

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.runs:
            run = self.runs.pop(data.draw(st.integers(0, len(self.runs) - 1)))
            self.keys.release(run)
            self.last = {place: held for place, held in self.last.items() if held[1] != run}

    @rule(seconds=st.sampled_from([1.0, LEASE_S, KEEP_S / 2]))
    def wait(self, seconds: float) -> None:
        self.keys.renew(self.runs[:1])
        renewed = {run.id for run in self.runs[:1]}
        for place, (request, run, until) in self.last.items():
            self.last[place] = request, run, self.clock.now + LEASE_S if run.id in renewed else until
        self.clock.now += seconds

    @rule()
    def purge(self) -> None:
        while self.keys.purge():
            pass
        day = KEEP_S - LEASE_S  # who has said nothing for that long after its lease is forgotten
        self.last = {place: held for place, held in self.last.items() if held[2] + day > self.clock.now}

    @invariant()
    def totals_are_sums_and_bounded(self) -> None:
        with self.store.read() as connection:
            rows = connection.execute(sa.select(idempotency)).all()
            assert all(row.bytes == len(row.body or b"") for row in rows)
        for tenant, (many, size) in totals(self.store).items():
            mine = [row for row in rows if row.tenant == tenant]
            assert (many, size) == (len(mine), sum(row.bytes for row in mine))
            assert size <= 30


def test_any_sequence_of_calls_runs_once_and_replays(tmp_path_factory: pytest.TempPathFactory) -> None:
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('machine')}/mmaas.db")
    store.migrate()
    machine = type("Machine", (KeysInUse,), {"store": store})
    calm = settings(max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
    machine.TestCase.settings = calm  # type: ignore[attr-defined]
    machine.TestCase().runTest()  # type: ignore[attr-defined]
    store.close()
