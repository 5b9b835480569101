"""The scheduler against a brute-force picture of what it may do: hypothesis drives arrivals, steps, aborts and preemption."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.types import Priority, Sampling
from deployments.engine.blocks import BlockPool
from deployments.engine.scheduler import Scheduler, Slice
from deployments.engine.sequence import Sequence


def make_sequence(prompt: list[int], max_tokens: int, *, salt: bytes = b"", priority: Priority = "interactive") -> Sequence:
    return Sequence(
        request_id=0,
        index=0,
        tokens=list(prompt),
        num_prompt=len(prompt),
        sampling=Sampling(),
        max_tokens=max_tokens,
        stop_ids=frozenset(),
        seed=0,
        salt=salt,
        priority=priority,
    )


def make_scheduler(num_blocks: int = 16, block_size: int = 4, **options: int | bool) -> Scheduler:
    options = {"max_sequences": 8, "max_batch_tokens": 32} | options
    return Scheduler(BlockPool(num_blocks, block_size), **options)  # type: ignore[arg-type]


def advance(scheduler: Scheduler, token: int = 7) -> list[Slice]:
    """One step of an engine whose model always says `token`."""
    slices = scheduler.schedule()
    scheduler.commit(slices)
    for item in slices:
        if item.start + item.count == len(item.sequence.tokens):
            item.sequence.append(token)
            if item.sequence.finish_reason:
                scheduler.finish(item.sequence)
    return slices


def run(scheduler: Scheduler, limit: int = 10_000) -> int:
    steps = 0
    while scheduler.has_work:
        assert advance(scheduler), "work is waiting and nothing was scheduled"
        scheduler.check_integrity()
        steps += 1
        assert steps < limit, "a sequence starves"
    return steps


def test_whole_prompt_enters_in_one_step_when_the_budget_allows() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence([1] * 10, 3)
    scheduler.add(sequence)
    assert [(item.start, item.count, item.samples) for item in scheduler.schedule()] == [(0, 10, True)]


def test_long_prompt_enters_in_chunks_beside_a_decoder() -> None:
    scheduler = make_scheduler(num_blocks=64, max_batch_tokens=16)
    first = make_sequence([1] * 4, 50)
    scheduler.add(first)
    advance(scheduler)
    scheduler.add(make_sequence([2] * 40, 1))
    chunks = [advance(scheduler) for _ in range(3)]
    assert all(step[0].sequence is first and step[0].count == 1 for step in chunks), "the decoder waits for nobody"
    assert [step[1].count for step in chunks] == [15, 15, 10]


def test_preempts_the_newest_when_blocks_run_out() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, prefix_cache=False)
    old, new = make_sequence([1] * 7, 9), make_sequence([2] * 7, 9)
    scheduler.add(old)
    scheduler.add(new)
    while not scheduler.num_preemptions:
        advance(scheduler)
    assert list(scheduler.running) == [old]
    assert list(scheduler.waiting) == [new]
    run(scheduler)
    assert old.num_output == new.num_output == 9


def test_preempted_sequence_keeps_its_tokens_and_recomputes_them() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, prefix_cache=False)
    old, new = make_sequence([1] * 7, 9), make_sequence([2] * 7, 9)
    scheduler.add(old)
    scheduler.add(new)
    while not scheduler.num_preemptions:
        advance(scheduler)
    before = list(new.tokens)
    assert new.num_computed == 0
    assert new.num_output > 0
    run(scheduler)
    assert new.tokens[: len(before)] == before


def test_same_prefix_is_computed_once() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(list(range(12)), 1))
    run(scheduler)
    again = make_sequence(list(range(12)), 1)
    scheduler.add(again)
    [item] = scheduler.schedule()
    assert (item.start, item.count) == (8, 4), "two of three blocks are shared; the last token must be computed"
    assert again.num_cached == 8


def test_prefix_of_another_salt_is_not_shared() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(list(range(12)), 1, salt=b"a"))
    run(scheduler)
    scheduler.add(make_sequence(list(range(12)), 1, salt=b"b"))
    [item] = scheduler.schedule()
    assert (item.start, item.count) == (0, 12)


def test_sequences_with_one_prompt_compute_it_once() -> None:
    """Choices of a request, or requests that come together."""
    scheduler = make_scheduler(num_blocks=64)
    leader, *others = (make_sequence(list(range(17)), 2) for _ in range(4))
    for sequence in (leader, *others):
        scheduler.add(sequence)
    assert [item.sequence for item in advance(scheduler)] == [leader]
    assert [item.count for item in advance(scheduler)] == [1, 1, 1, 1]


def test_who_begins_as_another_waits_for_that_part_alone() -> None:
    """Both ends are computed in one step."""
    scheduler = make_scheduler(num_blocks=64, max_batch_tokens=16)
    leader = make_sequence([*range(16), *range(100, 104)], 1)
    follower = make_sequence([*range(16), *range(200, 208)], 1)
    scheduler.add(leader)
    scheduler.add(follower)
    assert [(item.sequence, item.count) for item in advance(scheduler)] == [(leader, 16)]
    assert {(item.sequence, item.start, item.count) for item in advance(scheduler)} == {(leader, 16, 4), (follower, 16, 8)}


def test_who_comes_while_the_beginning_is_computed_waits_for_the_rest_of_it() -> None:
    scheduler = make_scheduler(num_blocks=64, max_batch_tokens=16)
    leader = make_sequence(list(range(40)), 1)
    scheduler.add(leader)
    advance(scheduler)
    follower = make_sequence([*range(40), 50], 1)
    scheduler.add(follower)
    assert [(item.sequence, item.count) for item in advance(scheduler)] == [(leader, 16)]
    advance(scheduler)
    [item] = advance(scheduler)
    assert (item.sequence, item.start, item.count) == (follower, 40, 1)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([*range(8), *range(100, 120)], {}),  # most of it is its own
        (list(range(20)), {"salt": b"another tenant's"}),
        ([*range(3), 99, *range(4, 20)], {}),  # not from the beginning
    ],
)
def test_others_enter_at_once(prompt: list[int], options: dict[str, bytes]) -> None:
    scheduler = make_scheduler(num_blocks=64, max_batch_tokens=64)
    scheduler.add(make_sequence(list(range(20)), 1))
    scheduler.add(make_sequence(prompt, 1, **options))
    assert len(advance(scheduler)) == 2


def test_nobody_follows_where_there_is_no_prefix_cache() -> None:
    scheduler = make_scheduler(num_blocks=64, max_batch_tokens=64, prefix_cache=False)
    for _ in range(2):
        scheduler.add(make_sequence(list(range(20)), 1))
    assert len(advance(scheduler)) == 2


@pytest.mark.parametrize(("first", "second", "together"), [("batch", "interactive", True), ("interactive", "batch", False)])
def test_interactive_does_not_wait_for_batch(first: Priority, second: Priority, together: bool) -> None:
    scheduler = make_scheduler(num_blocks=64, max_batch_tokens=64)
    scheduler.add(make_sequence(list(range(20)), 1, priority=first))
    advancing = scheduler.schedule()
    scheduler.launch(advancing)
    scheduler.add(make_sequence(list(range(20)), 1, priority=second))
    assert (len(scheduler.schedule()) == 1) == together


def test_follower_runs_even_when_its_leader_was_aborted() -> None:
    scheduler = make_scheduler()
    leader, follower = make_sequence(list(range(9)), 2), make_sequence(list(range(9)), 2)
    scheduler.add(leader)
    scheduler.add(follower)
    scheduler.schedule()
    assert follower.leader is leader
    scheduler.finish(leader)
    run(scheduler)
    assert follower.num_output == 2
    assert follower.leader is None, "a chain of leaders would stay in memory"


def test_nobody_follows_twice() -> None:
    scheduler = make_scheduler(num_blocks=64, max_batch_tokens=64)
    first, follower, second = (make_sequence(list(range(20)), 1) for _ in range(3))
    scheduler.add(first)
    scheduler.add(follower)
    scheduler.schedule()
    scheduler.finish(first)
    scheduler.add(second)
    assert [item.sequence for item in scheduler.schedule()] == [follower]


def test_guesses_take_only_what_budget_and_blocks_leave() -> None:
    scheduler = make_scheduler(num_blocks=5, block_size=4, max_batch_tokens=16, prefix_cache=False)
    first, second = make_sequence([1] * 6, 14), make_sequence([2] * 5, 14)
    scheduler.add(first)
    scheduler.add(second)
    advance(scheduler)
    slices = scheduler.extend(scheduler.schedule(), [[7] * 20, [7] * 20])
    assert {item.sequence: item.width for item in slices} == {first: 2, second: 7}, "two blocks each, and the fifth for one"
    assert scheduler.pool.num_available == 0
    assert scheduler.num_preemptions == 0
    scheduler.max_batch_tokens = 6
    scheduler.commit(slices)
    for item in slices:
        item.sequence.append(7)
        scheduler.accept(item.sequence, 0)
    assert scheduler.pool.num_available == 1, "the block that held guesses alone is back"
    slices = scheduler.extend(scheduler.schedule(), [[7] * 20, [7] * 20])
    assert sum(item.width for item in slices) == 6


def test_block_with_a_wrong_guess_is_never_shared() -> None:
    scheduler = make_scheduler(num_blocks=64, block_size=4)
    sequence = make_sequence([1, 2, 3], 9)
    scheduler.add(sequence)
    advance(scheduler, 4)
    [item] = scheduler.extend(scheduler.schedule(), [[5, 6, 7, 8, 9]])
    scheduler.commit([item])
    for token in (5, 9):
        sequence.append(token)
    scheduler.accept(sequence, 1)
    assert (sequence.num_computed, sequence.num_pending) == (5, 1)
    assert sequence.num_sealed == 1
    scheduler.finish(sequence)
    for tokens, cached in (([1, 2, 3, 4, 5, 6, 7, 8, 0], 4), ([1, 2, 3, 4, 5, 9, 0, 0, 0], 4)):
        again = make_sequence(tokens, 1)
        scheduler.add(again)
        scheduler.schedule()
        assert again.num_cached == cached
        scheduler.finish(again)


def test_finishing_twice_frees_once() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence([1] * 9, 4)
    scheduler.add(sequence)
    advance(scheduler)
    scheduler.finish(sequence)
    scheduler.finish(sequence)
    scheduler.check_integrity()
    assert scheduler.pool.num_used == 0


def test_sequence_longer_than_the_cache_does_not_fit() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    assert scheduler.fits(16)
    assert not scheduler.fits(17)


@pytest.mark.parametrize("seed", range(20))
def test_everything_finishes_in_arrival_order_of_first_tokens_without_preemption(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = make_scheduler(num_blocks=1000)
    sequences = [make_sequence([rng.randrange(50) for _ in range(rng.randint(1, 60))], rng.randint(1, 8)) for _ in range(40)]
    for sequence in sequences:
        scheduler.add(sequence)
    first: list[Sequence] = []
    while scheduler.has_work:
        advance(scheduler)
        first += [s for s in sequences if s.num_output and s not in first]
    assert first == sequences
    assert scheduler.num_preemptions == 0


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, steps and aborts over a pool that is too small: nothing starves, nothing leaks."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler(num_blocks=6, block_size=2, max_sequences=4, max_batch_tokens=6)
        self.alive: list[Sequence] = []
        self.expected: dict[int, list[int]] = {}

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=8),
        max_tokens=st.integers(1, 4),
        choices=st.integers(1, 3),
        tenant=st.sampled_from([b"", b"a", b"b"]),
        priority=st.sampled_from(["interactive", "interactive", "batch"]),
    )
    def arrive(self, prompt: list[int], max_tokens: int, choices: int, tenant: bytes, priority: Priority) -> None:
        for _ in range(choices):
            sequence = make_sequence(prompt, max_tokens, priority=priority)
            sequence.tenant = tenant
            self.scheduler.add(sequence)
            self.alive.append(sequence)
            self.expected[id(sequence)] = list(prompt)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.alive))
        self.alive.remove(sequence)
        self.scheduler.finish(sequence)
        assert not sequence.blocks

    @precondition(lambda self: self.alive)
    @rule(
        tokens=st.lists(st.integers(0, 2), min_size=5, max_size=5),
        drafts=st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=4, max_size=4),
    )
    def step(self, tokens: list[int], drafts: list[list[int]]) -> None:
        """The model says `tokens`, if it comes so far; every slice that samples tries a draft."""
        oldest = next(iter(self.scheduler.running), None)
        slices = self.scheduler.schedule()
        assert slices
        preemptions, alone = self.scheduler.num_preemptions, {id(item.sequence): item.count for item in slices}
        room = [item.sequence.max_tokens - item.sequence.num_output - 1 if item.samples else 0 for item in slices]
        slices = self.scheduler.extend(slices, [draft[:most] for draft, most in zip(drafts, room, strict=False)])
        assert self.scheduler.num_preemptions == preemptions
        assert len(alone) == len(slices)
        assert {id(item.sequence): item.count for item in slices} == alone, "a guess takes nobody's place"
        assert sum(item.width for item in slices) <= self.scheduler.max_batch_tokens
        assert oldest is None or oldest in [item.sequence for item in slices], "the oldest always advances"
        assert all(len(item.sequence.blocks) * 2 >= item.start + item.width for item in slices), "no block for a scheduled token"
        self.scheduler.commit(slices)
        for item in slices:
            if item.samples:
                self.take(item, tokens)

    def take(self, item: Slice, tokens: list[int]) -> None:
        sequence, guesses = item.sequence, [*item.draft, None]
        for place, (token, guess) in enumerate(zip(tokens, guesses, strict=False)):
            sequence.append(token)
            self.expected[id(sequence)].append(token)
            if token != guess or sequence.finish_reason:
                self.scheduler.accept(sequence, place)
                break
        if sequence.finish_reason:
            self.scheduler.finish(sequence)
            self.alive.remove(sequence)

    @invariant()
    def sound(self) -> None:
        self.scheduler.check_integrity()
        pool = self.scheduler.pool
        assert pool.num_used + pool.num_free + pool.num_cached == pool.num_blocks
        assert all(sequence.tokens == self.expected[id(sequence)] for sequence in self.alive)
        assert {id(s) for s in self.alive} == {id(s) for s in [*self.scheduler.waiting, *self.scheduler.running]}
        for s in self.scheduler.running:  # a prompt has its blocks from the beginning
            assert pool.blocks_for(s.num_computed) <= len(s.blocks) <= pool.blocks_for(len(s.tokens)), "a block holds guesses alone"

    def teardown(self) -> None:
        bound = sum(len(s.tokens) + s.max_tokens for s in self.alive) * 20 + 10
        run(self.scheduler, limit=bound)
        assert self.scheduler.pool.num_used == 0


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
