"""The policy between tenants and classes: against a naive model of it, and against the bound of the paper."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.types import Priority
from deployments.engine import flows
from deployments.engine.scheduler import Scheduler, Slice
from deployments.engine.sequence import Sequence
from tests.deployments.engine.fair_model import Job, Model
from tests.deployments.engine.test_scheduler import advance, make_scheduler, make_sequence


def make(tenant: str, prompt: int = 8, output: int = 4, priority: Priority = "interactive", seed: int = 0) -> Sequence:
    sequence = make_sequence([(seed * 7919 + place) % 997 for place in range(prompt)], output)
    sequence.tenant, sequence.priority = tenant.encode(), priority
    return sequence


ARRIVAL = st.tuples(
    st.sampled_from("abc"), st.sampled_from(["interactive", "interactive", "batch"]), st.integers(1, 12), st.integers(1, 6)
)


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(st.lists(ARRIVAL, max_size=3), min_size=1, max_size=25), slots=st.integers(1, 4), budget=st.integers(4, 14))
def test_every_step_is_that_of_the_naive_model(steps: list[list[tuple[str, Priority, int, int]]], slots: int, budget: int) -> None:
    scheduler = make_scheduler(num_blocks=1000, prefix_cache=False, max_sequences=slots, max_batch_tokens=budget)
    model, number, numbers = Model(slots, budget), 0, {}
    while scheduler.has_work or steps:
        assert model.clock < 10_000, "they never end"
        model.tick()
        for tenant, priority, prompt, output in steps.pop(0) if steps else ():
            sequence = make(tenant, prompt, output, priority)
            numbers[sequence] = number
            scheduler.add(sequence)
            model.add(Job(number, (priority, tenant), prompt, output))
            number += 1
        if scheduler.has_work:
            assert {numbers[item.sequence]: item.count for item in advance(scheduler)} == model.step()
            scheduler.check_integrity()


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.lists(ARRIVAL, max_size=4), min_size=1, max_size=25), num_blocks=st.integers(9, 60))
def test_no_step_leaves_work_undone_that_has_room(steps: list[list[tuple[str, Priority, int, int]]], num_blocks: int) -> None:
    scheduler = make_scheduler(num_blocks=num_blocks, block_size=2, max_sequences=4, max_batch_tokens=12)
    while scheduler.has_work or steps:
        for tenant, priority, prompt, output in steps.pop(0) if steps else ():
            scheduler.add(make(tenant, prompt, output, priority))
        preemptions, slices = scheduler.num_preemptions, advance_without_end(scheduler)
        if scheduler.waiting and scheduler.num_preemptions == preemptions:
            budget = sum(item.count for item in slices)
            head = next(iter(scheduler.waiting))
            no_room = scheduler.pool.blocks_for(len(head.tokens)) > scheduler.pool.num_available
            follows = head.leader in scheduler.running  # and has its beginning computed for it
            assert len(slices) == 4 or budget == 12 or no_room or follows, "a place is free, somebody waits"
        end(scheduler, slices)
        scheduler.check_integrity()
    assert scheduler.pool.num_used == 0


def advance_without_end(scheduler: Scheduler) -> list[Slice]:
    slices = scheduler.schedule()
    assert slices or not scheduler.has_work
    return slices


def end(scheduler: Scheduler, slices: list[Slice]) -> None:
    scheduler.commit(slices)
    for item in slices:
        if item.samples:
            item.sequence.append(7)
            if item.sequence.finish_reason:
                scheduler.finish(item.sequence)


# Tenants


Shape = tuple[str, int, int, Priority]  # tenant, prompt, output, class


def service(scheduler: Scheduler, num_steps: int, backlog: dict[str, Shape]) -> list[dict[str, float]]:
    """What each kind of request was given after each step, while many of each kind always wait."""
    given: dict[str, float] = dict.fromkeys(backlog, 0.0)
    kinds: dict[Sequence, str] = {}
    found = []
    for _ in range(num_steps):
        waiting = Counter(kinds[sequence] for sequence in scheduler.waiting)
        for kind, (tenant, prompt, output, priority) in backlog.items():
            for _ in range(16 - waiting[kind]):
                sequence = make(tenant, prompt, output, priority)
                kinds[sequence] = kind
                scheduler.add(sequence)
        for item in advance(scheduler):
            prompt = max(0, min(item.count, item.sequence.num_prompt - item.start))
            given[kinds[item.sequence]] += prompt + 2 * (item.count - prompt)
        found.append(dict(given))
    return found


def widest_gap(tenants: tuple[str, str], a: tuple[int, int], b: tuple[int, int]) -> float:
    """Between the service of two that always wait, over any time, as a part of what theorem 4.4 of the paper allows: twice the cost
    of the longest prompt, or of all tokens in a full batch."""
    scheduler = make_scheduler(num_blocks=200, block_size=4, prefix_cache=False, max_sequences=8, max_batch_tokens=64)
    found = service(scheduler, 1500, {"a": (tenants[0], *a, "interactive"), "b": (tenants[1], *b, "interactive")})
    bound = 2 * max(a[0], b[0], 2 * min(800, 8 * max(sum(a), sum(b))))
    assert min(found[-1].values()) > 3 * bound, "they were not served long enough to prove anything"
    gaps = [given["a"] - given["b"] for given in found]
    return (max(gaps) - min(gaps)) / bound


@pytest.mark.parametrize("shapes", [((100, 10), (10, 40)), ((60, 2), (3, 3)), ((30, 30), (30, 30)), ((1, 80), (80, 1))], ids=str)
def test_service_of_two_tenants_that_always_wait_stays_together(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    assert widest_gap(("a", "b"), *shapes) <= 1


def test_first_come_first_served_lets_it_drift_apart() -> None:
    assert widest_gap(("everybody", "everybody"), (60, 2), (3, 3)) > 3


def test_long_prompt_does_not_keep_the_budget_from_another_tenant() -> None:
    scheduler = make_scheduler(num_blocks=200, max_batch_tokens=32)
    scheduler.add(make("greedy", 300, 2))
    scheduler.add(make("greedy", 300, 2, seed=1))
    advance(scheduler)
    scheduler.add(make("modest", 10, 2, seed=2))
    counts = {item.sequence.tenant: item.count for item in advance(scheduler)}
    assert counts == {b"modest": 10, b"greedy": 22}


def test_two_long_prompts_of_two_tenants_share_the_budget() -> None:
    scheduler = make_scheduler(num_blocks=200, max_batch_tokens=33)
    scheduler.add(make("a", 300, 2))
    scheduler.add(make("b", 300, 2, seed=1))
    assert sorted(item.count for item in advance(scheduler)) == [16, 17]


def test_cached_prompts_cost_their_tenant_less() -> None:
    scheduler = make_scheduler(num_blocks=200, max_sequences=1, max_batch_tokens=64)
    for tenant, seeds in (("same", [1] * 40), ("other", range(40))):
        for seed in seeds:
            scheduler.add(make(tenant, 40, 1, seed=seed))
    done: Counter[bytes] = Counter()
    while done[b"same"] != 40:
        done.update(item.sequence.tenant for item in advance(scheduler) if item.sequence.finish_reason)
    assert done[b"other"] < 20


def test_preempted_work_is_paid_once() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, prefix_cache=False)
    sequences = [make("a", 7, 9), make("b", 7, 9)]
    for sequence in sequences:
        scheduler.add(sequence)
    flows = list(scheduler.waiting.interactive.flows.values())
    while scheduler.has_work:
        advance(scheduler)
    assert scheduler.num_preemptions > 0
    assert max(flow.served for flow in flows) == 7 + 2 * 8, "the last output token is never computed"


def test_nobody_waits_for_the_end_of_anothers_long_answers() -> None:
    scheduler = make_scheduler(num_blocks=4000, max_sequences=4, max_batch_tokens=64)
    for number in range(40):
        scheduler.add(make("greedy", 8, 2000, seed=number))
    for _ in range(50):
        advance(scheduler)
    modest = make("modest", 8, 4, seed=99)
    scheduler.add(modest)
    for _ in range(20):
        advance(scheduler)
    assert modest.finish_reason


# Classes


def test_batch_waits_while_interactive_is_there() -> None:
    scheduler = make_scheduler(num_blocks=200, max_sequences=1)
    scheduler.add(make("a", priority="batch"))
    scheduler.add(make("a", seed=1))
    assert [item.sequence.priority for item in scheduler.schedule()] == ["interactive"]


def test_interactive_takes_the_places_of_running_batch() -> None:
    scheduler = make_scheduler(num_blocks=200, max_sequences=2)
    scheduler.add(make("a", 4, 50, "batch"))
    scheduler.add(make("b", 4, 50, "batch", seed=1))
    advance(scheduler)
    scheduler.add(make("c", 4, 2, seed=2))
    assert {item.sequence.priority for item in advance(scheduler)} == {"interactive", "batch"}


def test_batch_is_preempted_before_interactive() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4, prefix_cache=False)
    for number, priority in enumerate(("interactive", "batch", "interactive")):
        scheduler.add(make(priority, 7, 9, priority, number))  # type: ignore[arg-type]
        advance(scheduler)
    while not scheduler.num_preemptions:
        advance(scheduler)
    assert [sequence.priority for sequence in scheduler.waiting] == ["batch"]


@pytest.mark.parametrize("shape", [(8, 8), (60, 4), (4, 60)], ids=str)
def test_batch_has_its_small_share_of_a_full_model(shape: tuple[int, int]) -> None:
    scheduler = make_scheduler(num_blocks=400, prefix_cache=False, max_sequences=8, max_batch_tokens=64)
    given = service(scheduler, 3000, {"interactive": ("a", *shape, "interactive"), "batch": ("a", *shape, "batch")})[-1]
    assert 0.03 < given["batch"] / sum(given.values()) < 0.08


@pytest.mark.parametrize("priority", ["interactive", "batch"])
@pytest.mark.parametrize("num_tenants", [1, 7, 2000])
def test_nobody_starves_while_others_come_without_end(
    priority: Priority, num_tenants: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool holds one such sequence and little more, so that preemption never ends either; new tenants come all the time."""
    monkeypatch.setattr(flows, "REMEMBERED", 16)
    scheduler = make_scheduler(num_blocks=12, block_size=4, max_sequences=4, max_batch_tokens=16)
    rng, patient = random.Random(0), make("patient", 20, 20, priority)
    for number in range(10_000):
        while len(scheduler.waiting) < 12:
            scheduler.add(make(f"t{rng.randrange(num_tenants)}", rng.randint(1, 24), rng.randint(1, 20), seed=rng.randrange(99)))
        if number == 50:
            scheduler.add(patient)
        advance(scheduler)
        scheduler.check_integrity()
        if patient.finish_reason:
            return
    raise AssertionError("it starves")


def test_memory_of_tenants_is_bounded_and_empty_when_all_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "REMEMBERED", 16)
    scheduler = make_scheduler(num_blocks=400, max_batch_tokens=64)
    scheduler.add(make("steady", 8, 700))
    known = 0
    for number in range(500):
        scheduler.add(make(f"once{number}", 8, 2, seed=number))
        advance(scheduler)
        scheduler.check_integrity()
        known = max(known, len(scheduler.waiting.interactive.flows))
    assert 10 < known < 60
    while scheduler.has_work:
        advance(scheduler)
    assert scheduler.waiting.interactive.flows == {}
