"""The engine's loop over a model that counts up."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from cluster.settings import EngineSettings
from deployments.engine.batch import Batch
from deployments.engine.engine import Engine, choice_seed
from tests.deployments.engine.arithmetic import count_up, request

SMALL = EngineSettings(block_size=4, max_sequences=4, max_batch_tokens=16)


def make_engine(num_blocks: int = 32) -> Engine:
    return Engine.of(count_up, num_blocks, SMALL)


def finish(engine: Engine) -> dict[tuple[int, int], list[int]]:
    answers: dict[tuple[int, int], list[int]] = defaultdict(list)
    while engine.has_work:
        for output in engine.step():
            answers[output.request_id, output.index].append(output.token)
    return answers


def test_answers_what_the_model_says() -> None:
    engine = make_engine()
    engine.add(request(1, [5]))
    engine.add(request(2, [40, 41, 42], 2))
    assert finish(engine) == {(1, 0): [6, 7, 8, 9], (2, 0): [43, 44]}


def test_stops_at_a_stop_token_and_says_so() -> None:
    engine = make_engine()
    engine.add(request(1, [5], 10, stop_ids=(8,)))
    outputs = [output for _ in range(3) for output in engine.step()]
    assert [(output.token, output.finish_reason) for output in outputs] == [(6, None), (7, None), (8, "stop")]
    assert not engine.has_work


def test_stop_token_before_min_tokens_is_passed_over() -> None:
    engine = make_engine()
    engine.add(request(1, [5], 4, stop_ids=(6,), min_tokens=2))
    assert 6 not in finish(engine)[1, 0][:2]


def test_every_choice_gets_its_own_answer() -> None:
    engine = make_engine()
    engine.add(request(1, list(range(10, 20)), 3, n=3))
    assert finish(engine) == {(1, index): [20, 21, 22] for index in range(3)}
    assert engine.stats().cached_tokens == 2 * 8, "two choices found the first one's prompt in the cache"


def test_abort_frees_the_blocks_in_the_same_step() -> None:
    engine = make_engine()
    engine.add(request(1, list(range(30)), 50, n=2))
    engine.step()
    engine.step()
    assert engine.stats().blocks_used > 0
    engine.abort(1)
    assert (engine.stats().blocks_used, engine.stats().aborted, engine.has_work) == (0, 2, False)
    engine.scheduler.check_integrity()


def test_abort_of_one_choice_leaves_the_others() -> None:
    engine = make_engine()
    engine.add(request(1, [3], 3, n=2))
    engine.step()
    engine.abort(1, 0)
    engine.abort(1, 0)
    assert (1, 0) not in finish(engine)
    assert engine.stats().aborted == 1


def test_abort_of_a_finished_request_is_nothing() -> None:
    engine = make_engine()
    engine.add(request(1, [3], 1))
    finish(engine)
    engine.abort(1)
    assert engine.stats().aborted == 0


def test_counts_add_up() -> None:
    engine = make_engine()
    engine.add(request(1, [1, 2, 3], 4))
    engine.add(request(2, [9, 9], 2))
    finish(engine)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.output_tokens, stats.running, stats.waiting) == (5, 6, 0, 0)
    assert 0 < stats.model_s < stats.busy_s


@limits(max_examples=60, deadline=None)
@given(
    work=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 8), st.integers(1, 3)), min_size=1, max_size=12),
    aborts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 11)), max_size=6),
    num_blocks=st.integers(7, 40),
)
def test_no_load_abort_or_preemption_changes_an_answer(
    work: list[tuple[int, int, int]], aborts: list[tuple[int, int]], num_blocks: int
) -> None:
    engine = make_engine(num_blocks)
    for number, (length, max_tokens, n) in enumerate(work):
        engine.add(request(number, list(range(number, number + length)), max_tokens, n=n))
    answers: dict[tuple[int, int], list[int]] = defaultdict(list)
    step = 0
    while engine.has_work:
        for at, number in aborts:
            if at == step:
                engine.abort(number)
        for output in engine.step():
            answers[output.request_id, output.index].append(output.token)
        engine.scheduler.check_integrity()
        step += 1
    gone = {number for _, number in aborts}
    for number, (length, max_tokens, n) in enumerate(work):
        expected = [number + length + place for place in range(max_tokens)]
        for index in range(n):
            answer = answers[number, index]
            assert answer == expected if number not in gone else answer == expected[: len(answer)]
    assert engine.stats().blocks_used == 0


def test_choices_of_a_seed_are_different_and_stable() -> None:
    seeds = [choice_seed(-5, index) for index in range(100)]
    assert len(set(seeds)) == 100
    assert seeds == [choice_seed(-5, index) for index in range(100)]
    assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize("lengths", [(1,), (3, 1, 1), (40, 2)])
def test_batch_survives_the_wire(lengths: tuple[int, ...]) -> None:
    engine = make_engine()
    seen: list[Batch] = []
    engine.execute = lambda batch: (seen.append(batch), count_up(batch))[1]
    for number, length in enumerate(lengths):
        engine.add(request(number, list(range(length)), 3))
    finish(engine)
    for batch in seen:
        copy = Batch.unpack(batch.pack())
        assert all((getattr(copy, name) == getattr(batch, name)).all() for name in Batch.__slots__)
