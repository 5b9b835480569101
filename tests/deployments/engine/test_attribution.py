"""A step's time is theirs who were in it, whatever becomes of them: against a book that is kept beside the engine."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from deployments.engine.engine import Engine
from deployments.engine.local import LocalEngine
from deployments.engine.messages import Request
from deployments.engine.sequence import Sequence
from tests.deployments.engine import test_overlap as overlap
from tests.deployments.engine.arithmetic import request
from tests.deployments.engine.families import build
from tests.deployments.engine.guesses import Guesses
from tests.deployments.engine.test_local import FEW_BLOCKS, GREEDY, TIGHT, prompts, through


class Book:
    """Reads an engine's steps as they land, and what each took, and hears what its outputs tell."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.sequences: list[Sequence] = []
        self.owed: dict[Sequence, float] = defaultdict(float)  # microseconds
        self.steps: dict[Sequence, int] = defaultdict(int)
        self.told: dict[tuple[int, int], int] = {}
        self._landed: list[Any] = []
        engine.scheduler.commit = self._watched(engine.scheduler.commit)  # type: ignore[method-assign]

    def _watched(self, commit: Any) -> Any:
        def landing(slices: Any) -> None:
            self._landed = list(slices)
            commit(slices)

        return landing

    def add(self, asked: Request) -> None:
        self.engine.add(asked)
        self.sequences += self.engine._requests[asked.id]

    def step(self) -> None:
        before = self.engine.stats().busy_s
        for output in self.engine.step():
            choice = output.request_id, output.index
            assert output.compute_us >= self.told.get(choice, 0)
            self.told[choice] = output.compute_us
        took, rows = self.engine.stats().busy_s - before, sum(item.width for item in self._landed)
        for item in self._landed:
            self.owed[item.sequence] += took * 1e6 * item.width / rows
            self.steps[item.sequence] += 1
        self._landed = []

    def check(self) -> None:
        engine = self.engine
        attributed = round(engine.stats().attributed_s * 1e6)
        assert sum(sequence.compute_us for sequence in self.sequences) == attributed
        assert attributed == pytest.approx(engine.stats().busy_s * 1e6, abs=1.1)
        for sequence in self.sequences:
            assert abs(sequence.compute_us - self.owed[sequence]) <= 2 * self.steps[sequence]
            if sequence.finish_reason:
                assert self.told[sequence.request_id, sequence.index] == sequence.compute_us, "its last word says the whole"


@limits(max_examples=80, deadline=None)
@given(
    work=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 8), st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=12),
    aborts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 11)), max_size=6),
    num_blocks=st.integers(7, 40),
    depth=st.integers(1, 3),
    guesses=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_sequences_pay_is_the_time_of_the_steps_by_their_rows(
    work: list[tuple[int, int, int, int]],
    aborts: list[tuple[int, int]],
    num_blocks: int,
    depth: int,
    guesses: bool,
    seed: int,
) -> None:
    """Whatever is preempted, aborted (also while its step is under way), guessed, or found in the prefix cache."""
    asked = [
        msgspec.structs.replace(
            request(number, [(number + place) % 12 for place in range(length)], max_tokens, n=n), tenant=bytes([tenant])
        )
        for number, (length, max_tokens, n, tenant) in enumerate(work)
    ]
    engine = overlap.make_engine(num_blocks, depth)
    if guesses:
        plain = overlap.make_engine(200, 1)
        for one in asked:
            plain.add(one)
        engine.speculation = Guesses(overlap.run(plain))
    ticks = random.Random(seed)
    engine.clock = itertools.accumulate(ticks.expovariate(1000) for _ in itertools.count()).__next__
    book = Book(engine)
    for one in asked:
        book.add(one)
    for step in itertools.count():
        if not engine.has_work:
            break
        for at, number in aborts:
            if at == step:
                engine.abort(number)
        book.step()
    book.check()


@pytest.mark.parametrize("path", ["torch", "native"])
def test_all_the_time_that_a_real_model_works_is_somebodys(tmp_path: Path, path: str) -> None:
    """In chunks, with preemption, several choices, guesses, an abort, and prompts that the prefix cache knows."""
    with LocalEngine(build("llama", tmp_path / "model"), settings=through(path, TIGHT), blocks=FEW_BLOCKS[path]) as local:
        engine = local.engine
        answers = local.generate(prompts(), GREEDY)
        assert sum(answer.compute_us for answer in answers) == round(engine.stats().attributed_s * 1e6)
        before = engine.stats()
        engine.speculation = Guesses(
            {(number, index): answer.token_ids for number, answer in enumerate(answers) for index in (0, 1)}
        )
        book = Book(engine)
        for number, prompt in enumerate(prompts()):
            book.add(Request(number, prompt, replace(GREEDY, n=2), 12, [], 0))
        for step in itertools.count():
            if not engine.has_work:
                break
            if step == 6:
                engine.abort(1)
            book.step()
        after = engine.stats()
        assert after.aborted > 0
        assert after.preemptions > 0
        assert after.accepted_tokens > 0
        assert sum(sequence.compute_us for sequence in book.sequences) == round((after.attributed_s - before.attributed_s) * 1e6)
        assert after.attributed_s == pytest.approx(after.busy_s, abs=1.1e-6)
        assert all(sequence.compute_us > 0 for sequence in book.sequences if sequence.finish_reason)
        assert after.busy_s < after.held_s
