"""Several steps under way at once, one a stage: no answer changes, no sequence is in two of them, and all stages are busy."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from cluster.settings import EngineSettings
from deployments.engine.batch import Batch
from deployments.engine.engine import Engine
from tests.deployments.engine.arithmetic import Recall, request
from tests.deployments.engine.guesses import Guesses

SMALL = EngineSettings(block_size=4, max_sequences=6, max_batch_tokens=16, speculation=0)
Answers = dict[tuple[int, int], list[int]]


class Pipeline:
    """A model in two stages, which have their own keys and values: the first works when a step is launched, the last when it is
    finished. They must see the same."""

    def __init__(self, num_blocks: int) -> None:
        self.first, self.last = Recall(num_blocks, SMALL.block_size), Recall(num_blocks, SMALL.block_size)
        self.between: deque[tuple[Batch, torch.Tensor]] = deque()

    def launch(self, batch: Batch) -> None:
        self.between.append((batch, self.first(batch)))

    def execute(self, batch: Batch) -> torch.Tensor:
        launched, seen = self.between.popleft()
        assert launched is batch, "steps overtake each other"
        logits = self.last(batch)
        assert torch.equal(logits, seen)
        return logits


def make_engine(num_blocks: int, depth: int) -> Engine:
    model = Pipeline(num_blocks)
    return Engine.of(model.execute, num_blocks, SMALL, launch=model.launch, depth=depth)


def check(engine: Engine) -> None:
    flying = [item.sequence for flight in engine._flights for item in flight.slices]
    assert len(flying) == len(set(flying)), "a sequence is in two steps"
    assert len(engine._flights) < engine.scheduler.depth
    engine.scheduler.check_integrity()


def run(engine: Engine, aborts: list[tuple[int, int]] = []) -> Answers:  # noqa: B006
    answers: Answers = defaultdict(list)
    step = 0
    while engine.has_work:
        for at, number in aborts:
            if at == step:
                engine.abort(number)
        for output in engine.step():
            answers[output.request_id, output.index].append(output.token)
        check(engine)
        step += 1
        assert step < 3000, "nothing advances any more"
    return answers


@limits(max_examples=120, deadline=None)
@given(
    work=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 8), st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=12),
    aborts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 11)), max_size=6),
    num_blocks=st.integers(7, 40),
    depth=st.integers(2, 4),
    guesses=st.booleans(),
)
def test_overlapping_steps_change_no_answer(
    work: list[tuple[int, int, int, int]], aborts: list[tuple[int, int]], num_blocks: int, depth: int, guesses: bool
) -> None:
    def fill(engine: Engine) -> Engine:
        for number, (length, max_tokens, n, tenant) in enumerate(work):
            sampled: dict[str, Any] = {"temperature": 1.0, "n": n} if number % 2 else {"n": n}
            made = request(number, [(number + place) % 12 for place in range(length)], max_tokens, **sampled)
            engine.add(msgspec.structs.replace(made, tenant=bytes([tenant])))
        return engine

    expected = run(fill(make_engine(200, 1)))
    engine = fill(make_engine(num_blocks, depth))
    if guesses:
        engine.speculation = Guesses(expected)
    answers = run(engine, aborts)
    gone = {number for _, number in aborts}
    for choice, answer in expected.items():
        assert answers[choice] == answer if choice[0] not in gone else answers[choice] == answer[: len(answers[choice])]
    assert engine.stats().blocks_used == 0
    assert not engine.scheduler.under_way


@pytest.mark.parametrize("depth", [2, 3])
def test_every_stage_has_its_share_of_the_sequences(depth: int) -> None:
    engine = make_engine(64, depth)
    for number in range(6):
        engine.add(request(number, [number], 40))
    for _ in range(10):
        engine.step()
    widths = []
    for _ in range(3 * depth):
        engine.step()
        widths.append([len(flight.slices) for flight in engine._flights])
    assert widths == [[6 // depth] * (depth - 1)] * len(widths)


def test_draining_finishes_what_is_under_way_and_begins_nothing() -> None:
    engine = make_engine(64, 3)
    for number in range(6):
        engine.add(request(number, [number], 4))
    before = len(engine.step())
    under_way = sum(len(flight.slices) for flight in engine._flights)
    outputs = engine.drain()
    assert (len(outputs), before > 0, engine.drain()) == (under_way, True, [])
    assert engine.has_work
    assert sum(map(len, run(engine).values())) == 24 - before - under_way


def test_an_aborted_sequence_says_nothing_more_and_its_mates_do() -> None:
    engine = make_engine(64, 2)
    for number in range(4):
        engine.add(request(number, [number], 8))
    for _ in range(4):
        engine.step()
    flying = {item.sequence.request_id for flight in engine._flights for item in flight.slices}
    gone = min(flying)
    engine.abort(gone)
    outputs = engine.step()
    assert {output.request_id for output in outputs} == flying - {gone}
    assert (gone, 0) not in run(engine)
