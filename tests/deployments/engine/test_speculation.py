"""When guessing pays: the policy against brute force, and against machines whose steps cost what the test says."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from cluster.settings import EngineSettings
from deployments.engine.batch import Batch
from deployments.engine.engine import Engine
from deployments.engine.speculation import MEMORY, NEWEST, TRIED, Costs, best_lengths, weighted_quantile
from tests.deployments.engine.arithmetic import Recall, request


@limits(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(0, 0.97), st.integers(0, 3)), min_size=1, max_size=4),
    price=st.floats(0.001, 1),
    others=st.integers(0, 3),
)
def test_lengths_are_the_best_of_all(rows: list[tuple[float, int]], price: float, others: int) -> None:
    chances, most = [chance for chance, _ in rows], [limit for _, limit in rows]
    decoders = len(rows) + others

    def rate(lengths: tuple[int, ...]) -> float:
        gains = [chance**place for chance, length in zip(chances, lengths, strict=True) for place in range(1, length + 1)]
        return (decoders + sum(gains)) / (1 + price * len(gains))

    best = max(rate(lengths) for lengths in product(*(range(limit + 1) for limit in most)))
    assert rate(tuple(best_lengths(chances, most, price, decoders))) == pytest.approx(best)


def test_no_length_below_zero() -> None:
    assert best_lengths([0.9, 0.9], [0, -1], 0.01, 2) == [0, 0]


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(1, 4)), min_size=1, max_size=9))
def test_weighted_quantile_is_the_lower_median_of_the_values_repeated(pairs: list[tuple[int, int]]) -> None:
    repeated = sorted(value for value, weight in pairs for _ in range(weight))
    assert weighted_quantile(pairs, 1 / 2) == repeated[(len(repeated) - 1) // 2]


def test_price_is_measured_and_one_slow_step_does_not_change_it() -> None:
    costs = Costs()
    assert costs.price(4) is None
    for step in range(6):
        costs.add(step, 0, 2.0)
    assert costs.price(4) == pytest.approx(1 / 36), "as long as nothing is measured"
    for rows in (3, 4, 5, 8):
        costs.add(7, rows, 2.0 + 0.2 * rows)
    costs.add(8, 2, 60.0)
    costs.add(9, 0, 90.0)
    assert costs.price(4) == pytest.approx(0.1)
    costs.forget(before=9)
    assert costs.price(4) is None


def test_memory_is_bounded() -> None:
    costs = Costs()
    for step in range(1000):
        costs.add(step, step % 3, 1.0)
    assert (len(costs.plain), len(costs.drafted)) == (NEWEST, TRIED)


@dataclass
class Machine:
    """A model behind a clock: a step takes `base` and `row` for each row, and up to `jitter` more, as a share."""

    model: Recall
    base: float
    row: float
    now: float = 0.0
    rows: int = 0
    jitter: float = 0.0
    noise: random.Random = field(default_factory=lambda: random.Random(0))

    def execute(self, batch: Batch) -> torch.Tensor:
        self.now += (self.base + self.row * len(batch.tokens)) * (1 + self.jitter * self.noise.random())
        self.rows += len(batch.tokens)
        return self.model(batch)


SETTINGS = EngineSettings(block_size=4, max_sequences=32, max_batch_tokens=512, prefix_cache=False)


def serve(sequences: int, *, surprise: float, row: float, guesses: int, steps: int = 300) -> tuple[float, Engine]:
    """Tokens per second of so many greedy answers without an end, for the time of so many plain steps. A row costs `row` and
    reading the weights 1."""
    machine = Machine(Recall(32_000, 4, vocabulary=40, surprise=surprise), 1.0, row)
    engine = Engine.of(machine.execute, 32_000, SETTINGS.model_copy(update={"speculation": guesses}))
    engine.clock = lambda: machine.now
    for number in range(sequences):
        engine.add(request(number, [number % 40, 3], 4000))
    while machine.now < steps * (1 + row * sequences):
        engine.step()
    return engine.stats().output_tokens / machine.now, engine


@pytest.mark.parametrize("sequences", [1, 8, 32])
@pytest.mark.parametrize("row", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("surprise", [0.0, 0.5, 3.0])
def test_guessing_is_never_a_loss(sequences: int, row: float, surprise: float) -> None:
    steps = 300 if sequences < 32 else 120
    plain, _ = serve(sequences, surprise=surprise, row=row, guesses=0, steps=steps)
    guessing, _ = serve(sequences, surprise=surprise, row=row, guesses=8, steps=steps)
    assert guessing > 0.98 * plain


@pytest.mark.parametrize("sequences", [1, 8])
def test_text_that_repeats_itself_is_served_faster(sequences: int) -> None:
    plain, _ = serve(sequences, surprise=0.0, row=0.02, guesses=0)
    guessing, engine = serve(sequences, surprise=0.0, row=0.02, guesses=8)
    stats = engine.stats()
    assert guessing > 2 * plain
    assert stats.accepted_tokens > 0.8 * stats.drafted_tokens


def test_a_clock_that_jitters_hardly_ever_ends_guessing() -> None:
    """A step is up to 0.4 longer by chance; one row of guesses makes it 0.02 longer."""
    accepted = []
    for seed in range(20):
        machine = Machine(Recall(32_000, 4, vocabulary=40, surprise=0.2), 1.0, 0.02, jitter=0.4, noise=random.Random(seed))
        engine = Engine.of(machine.execute, 32_000, SETTINGS)
        engine.clock = lambda machine=machine: machine.now
        for number in range(8):
            engine.add(request(number, [number, 3], 4000))
        for _ in range(100):
            engine.step()
        accepted.append(engine.stats().accepted_tokens)
    assert sum(count > 100 for count in accepted) >= 19, accepted


def test_where_rows_cost_what_they_bring_nothing_is_guessed_for_long() -> None:
    _, engine = serve(8, surprise=1.0, row=10.0, guesses=8)
    assert engine.stats().drafted_tokens < 100


def test_a_price_is_measured_again_after_a_while() -> None:
    machine = Machine(Recall(4000, 4, vocabulary=40, surprise=0.0), 1.0, 100.0)
    engine = Engine.of(machine.execute, 4000, SETTINGS)
    engine.clock = lambda: machine.now
    engine.add(request(0, [1, 3], 3 * MEMORY))
    for _ in range(MEMORY // 2):
        engine.step()
    dear = engine.stats().drafted_tokens
    machine.row = 0.001
    for _ in range(MEMORY):
        engine.step()
    assert engine.stats().accepted_tokens > 10 * dear
