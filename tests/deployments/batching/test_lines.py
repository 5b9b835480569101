"""Who is encoded next, in simulated time and against invariants."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from deployments.batching.lines import Call, Lines
from deployments.encode.row import Row


def rows(count: int, length: int = 8) -> list[Row]:
    return [Row([1] * length) for _ in range(count)]


def test_one_row_of_another_tenant_goes_into_the_very_next_step() -> None:
    lines = Lines(1 << 30)
    lines.add(b"bulk", rows(2048, 64))
    for _ in range(10):
        assert len(lines.take(1024)) == 16
    lines.add(b"other", rows(1, 64))
    assert b"other" in {piece.call.tenant for piece in lines.take(1024)}


def test_a_search_goes_before_the_bulk_of_its_own_tenant() -> None:
    lines = Lines(1 << 30)
    lines.add(b"acme", rows(2048, 64))
    lines.take(1024)
    search = lines.add(b"acme", rows(1, 64))
    assert search in {piece.call for piece in lines.take(1024)}


@given(st.lists(st.integers(4, 300), min_size=2, max_size=5), st.integers(1, 8))
@settings(max_examples=15, deadline=None)
def test_tenants_that_always_wait_get_the_same_number_of_tokens(lengths: list[int], rounds: int) -> None:
    lines, served = Lines(1 << 40), Counter[bytes]()
    for name, length in enumerate(lengths):
        lines.add(b"%d" % name, rows(2000, length))
    for _ in range(rounds * 5):
        for piece in lines.take(256):
            served[piece.call.tenant] += len(piece.row)
    given_tokens = [served[b"%d" % name] for name in range(len(lengths))]
    assert max(given_tokens) - min(given_tokens) <= 2 * max(lengths)


def simulated_waits(*, bulk: int, seed: int = 1) -> list[float]:
    """Seconds that one row a second waits for its answer while another tenant keeps `bulk` rows waiting; 10,000 tokens a second."""
    lines, now, waits = Lines(1 << 40), 0.0, list[float]()
    asked: dict[Call, float] = {}
    due = [second + 0.1 * (seed * second % 7) for second in range(60)]
    while len(waits) < 60:
        while due and due[0] <= now:
            asked[lines.add(b"small", rows(1, 64))] = due.pop(0)
        if bulk and lines.num_rows < bulk:
            lines.add(b"bulk", rows(bulk, 64))
        step = lines.take(400)
        if not step:
            now = due[0]
            continue
        now += sum(len(piece.row) for piece in step) / 10_000
        waits += [now - asked[piece.call] for piece in step if piece.call in asked]
    return sorted(waits)


def test_a_tenants_bulk_costs_another_no_more_than_two_steps() -> None:
    assert simulated_waits(bulk=2048)[-1] <= simulated_waits(bulk=0)[-1] + 2 * 0.04


def test_a_full_queue_loses_the_newest_call_of_who_has_most() -> None:
    lines = Lines(1000)
    first, newest = lines.add(b"greedy", rows(60)), lines.add(b"greedy", rows(60))
    assert lines.make_room(b"greedy", 160) is None
    assert lines.make_room(b"other", 160) == [newest]
    assert lines.num_tokens == 480
    assert first.rows


def test_who_would_have_most_is_refused_and_nothing_is_lost() -> None:
    lines = Lines(1000)
    lines.add(b"small", rows(100))
    assert lines.make_room(b"large", 900) is None
    assert lines.num_tokens == 800


def test_an_empty_queue_takes_any_call() -> None:
    assert Lines(10).make_room(b"a", 1000) == []


class LinesKeepCount(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.lines = Lines(2000)
        self.calls: dict[Call, set[int]] = {}

    @rule(tenant=st.sampled_from([b"a", b"b", b"c"]), count=st.integers(1, 30), length=st.integers(1, 40))
    def add(self, tenant: bytes, count: int, length: int) -> None:
        leaving = self.lines.make_room(tenant, count * length)
        if leaving is not None:
            for call in leaving:
                assert not call.rows
                del self.calls[call]
            self.calls[self.lines.add(tenant, rows(count, length))] = set(range(count))

    @rule(budget=st.integers(1, 300))
    def take(self, budget: int) -> None:
        step = self.lines.take(budget)
        assert sum(len(piece.row) for piece in step) <= budget or len(step) == 1
        assert step or not any(self.calls.values()), "somebody waits and nobody is served"
        for piece in step:
            self.calls[piece.call].remove(piece.place)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.calls:
            call = data.draw(st.sampled_from(list(self.calls)))
            self.lines.discard(call)
            del self.calls[call]

    @invariant()
    def counts(self) -> None:
        assert self.lines.num_rows == sum(map(len, self.calls.values()))
        assert self.lines.num_tokens == sum(call.num_tokens for call in self.calls)
        assert all({place for place, _ in call.rows} == places for call, places in self.calls.items())


TestLines = LinesKeepCount.TestCase
TestLines.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
