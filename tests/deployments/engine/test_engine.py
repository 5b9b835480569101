"""The engine's loop over a model that counts up."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from cluster.settings import EngineSettings
from deployments.engine.batch import Batch
from deployments.engine.engine import Engine, choice_seed
from deployments.engine.messages import Output, Request
from tests.deployments.engine.arithmetic import Recall, count_up, request
from tests.deployments.engine.guesses import Guesses

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


@given(counts=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=6))
def test_rows_are_the_last_ones_of_each_sampled_sequence(counts: list[tuple[int, int]]) -> None:
    wanted = [min(pair) for pair in counts]
    empty = np.zeros(0, np.int32)
    sampled = np.repeat(np.arange(len(counts), dtype=np.int32), wanted)
    batch = Batch(empty, empty, np.array([count for count, _ in counts], np.int32), sampled, empty)
    tokens = [(row, place) for row, (count, _) in enumerate(counts) for place in range(count)]
    expected = [(row, place) for row, place in tokens if place >= counts[row][0] - wanted[row]]
    assert [tokens[row] for row in batch.rows] == expected


def answers(engine: Engine, work: list[Request], aborts: dict[int, int] | None = None) -> dict[tuple[int, int], list[Output]]:
    """Everything that comes, by request and choice, without what depends on the prefix cache or on time. `aborts`: by step."""
    for item in work:
        engine.add(item)
    told: dict[tuple[int, int], list[Output]] = defaultdict(list)
    step = 0
    while engine.has_work:
        if aborts and step in aborts:
            engine.abort(aborts[step])
        for output in engine.step():
            told[output.request_id, output.index].append(msgspec.structs.replace(output, cached=0, compute_us=0))
        engine.scheduler.check_integrity()
        step += 1
    assert engine.stats().blocks_used == 0
    return told


def recall(num_blocks: int, **options: Any) -> Engine:
    settings = SMALL.model_copy(update={"speculation": 0} | options)
    return Engine.of(Recall(num_blocks, settings.block_size), num_blocks, settings)


samplings = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.0, 0.7, 1.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.4]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "min_tokens": st.sampled_from([0, 3]),
        "logit_bias": st.sampled_from([(), ((3, 1.0), (5, -1.0))]),
        "logprobs": st.sampled_from([None, None, 2]),
        "n": st.sampled_from([1, 1, 3]),
        "stop_ids": st.sampled_from([(), (), (4,), (1, 7)]),
    }
)
prompts = st.lists(st.integers(0, 11), min_size=1, max_size=20)


@limits(max_examples=100, deadline=None)
@given(
    work=st.lists(st.tuples(prompts, st.integers(1, 14), samplings), min_size=1, max_size=6),
    num_blocks=st.integers(9, 40),
    lies=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    prefix_cache=st.booleans(),
    seed=st.integers(0, 99),
)
def test_guesses_change_nothing_of_an_answer(
    work: list[tuple[list[int], int, dict[str, Any]]], num_blocks: int, lies: float, prefix_cache: bool, seed: int
) -> None:
    requests = [request(number, prompt, length, **options) for number, (prompt, length, options) in enumerate(work)]
    expected = answers(recall(200, prefix_cache=False), requests)
    guessing = recall(num_blocks, prefix_cache=prefix_cache)
    right = {key: [output.token for output in outputs] for key, outputs in expected.items()}
    guessing.speculation = Guesses(right, lies=lies, seed=seed)
    assert answers(guessing, requests) == expected
    stats = guessing.stats()
    assert stats.output_tokens == sum(map(len, right.values()))
    assert stats.accepted_tokens <= stats.drafted_tokens


def test_abort_between_guesses_leaves_the_others_alone() -> None:
    work = [request(number, [number, 1, 2], 20, temperature=0.8) for number in range(4)]
    expected = answers(recall(200), work)
    guessing = recall(30)
    guessing.speculation = Guesses({key: [output.token for output in outputs] for key, outputs in expected.items()})
    told = answers(guessing, work, aborts={1: 2, 3: 0})
    assert {key: told[key] for key in ((1, 0), (3, 0))} == {key: expected[key] for key in ((1, 0), (3, 0))}
    assert all(told[key] == expected[key][: len(told[key])] for key in expected)
    assert guessing.stats().aborted == 2


def test_right_guesses_save_steps() -> None:
    work = [request(1, [5, 3], 40)]
    plain = recall(40)
    right = {key: [output.token for output in outputs] for key, outputs in answers(plain, work).items()}
    guessing = recall(40)
    guessing.speculation = Guesses(right, lies=0.0, limit=6)
    answers(guessing, work)
    stats = guessing.stats()
    assert stats.accepted_tokens == stats.drafted_tokens > 20
    assert stats.steps == plain.stats().steps - stats.accepted_tokens


def test_prompt_lookup_itself_changes_nothing_and_is_right_where_text_repeats() -> None:
    """Prompts in chunks, a pool that preempts, many at once: with the drafter and the policy that serve."""
    work = [request(number, [number % 12, 3, number % 5] * 5, 60, n=2) for number in range(6)]
    expected = answers(recall(300), work)
    guessing = recall(60, speculation=8)
    guessing.clock = itertools.count().__next__  # every step takes the same time, so that a row is free
    assert answers(guessing, work) == expected
    stats = guessing.stats()
    assert stats.preemptions > 0
    assert stats.accepted_tokens > 50
