"""The sampler against transformers' logits processors and plain arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cluster.types import Sampling
from deployments.engine.sampler import adjust, best, choose, draw, sample, sample_here, sample_there, truncate, uniform
from deployments.engine.sequence import NO_TOKEN, Sequence
from deployments.engine.structured import Allowed, unpacked

SIZE = 50


def sequence(sampling: Sampling, *, prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), **fields: object) -> Sequence:
    options = {"max_tokens": 100, "stop_ids": frozenset(), "seed": 7, "request_id": 0, "index": 0} | fields
    return Sequence(tokens=[*prompt, *output], num_prompt=len(prompt), sampling=sampling, **options)  # type: ignore[arg-type]


def random_logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(seed)) * 3


@limits(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.2, 2),
    top_k=st.integers(1, SIZE),
    top_p=st.floats(0.05, 0.99),
    min_p=st.floats(0.01, 0.9),
)
def test_truncation_keeps_the_tokens_that_transformers_keeps(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = TemperatureLogitsWarper(temperature)(None, random_logits(seed))
    expected = logits
    for warper in (TopKLogitsWarper(top_k), TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)):
        expected = warper(None, expected)
    actual = truncate(logits, [Sampling(top_k=top_k, top_p=top_p, min_p=min_p)])
    assert torch.equal(actual.isfinite(), expected.isfinite())
    assert torch.equal(actual[actual.isfinite()], logits[actual.isfinite()])


@limits(deadline=None)
@given(
    rows=st.lists(st.lists(st.sampled_from([-math.inf, -3.0, 0.0, 0.5, 2.0]), min_size=9, max_size=9), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_largest_is_the_first_of_equals(rows: list[list[float]], dtype: torch.dtype) -> None:
    first = [row.index(max(row)) if max(row) > -math.inf else NO_TOKEN for row in rows]
    assert best(torch.tensor(rows, dtype=dtype)) == first


def test_each_row_is_truncated_by_its_own_rules() -> None:
    logits = random_logits(0, rows=3)
    kept = truncate(logits, [Sampling(top_k=3), Sampling(), Sampling(top_p=1e-9)]).isfinite().sum(1)
    assert kept.tolist() == [3, SIZE, 1]


@given(seed=st.integers(0, 1000), penalty=st.floats(0.5, 2), tokens=st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=30))
@limits(max_examples=50, deadline=None)
def test_repetition_penalty_is_that_of_transformers(seed: int, penalty: float, tokens: list[int]) -> None:
    logits = random_logits(seed)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), logits.clone())
    actual = adjust(logits[0].clone(), sequence(Sampling(repetition_penalty=penalty), prompt=tuple(tokens)))
    torch.testing.assert_close(actual, expected[0])


def test_frequency_and_presence_count_the_output_alone() -> None:
    logits = torch.zeros(SIZE)
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=0.25)
    actual = adjust(logits, sequence(sampling, prompt=(9, 9), output=(3, 3, 4)))
    assert actual[[3, 4, 9]].tolist() == [-1.25, -0.75, 0.0]


def test_logit_bias_can_force_and_forbid() -> None:
    logits = random_logits(1)
    forced = sample(logits.clone(), [sequence(Sampling(temperature=0, logit_bias=((8, 100.0),)))])
    assert forced[0].token == 8
    best = int(logits.argmax())
    assert sample(logits.clone(), [sequence(Sampling(temperature=0, logit_bias=((best, -100.0),)))])[0].token != best


def test_end_cannot_come_before_min_tokens() -> None:
    logits = torch.zeros(1, SIZE)
    logits[0, 5] = 10
    early = sequence(Sampling(temperature=0, min_tokens=2), output=(1,), stop_ids=frozenset({5}))
    late = sequence(Sampling(temperature=0, min_tokens=2), output=(1, 1), stop_ids=frozenset({5}))
    assert sample(logits.clone(), [early])[0].token != 5
    assert sample(logits.clone(), [late])[0].token == 5


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    total = 20_000
    items = [sequence(Sampling(), seed=seed) for seed in range(total)]
    tokens = torch.tensor(draw(logits.expand(total, -1), items))
    expected = logits[0].softmax(-1) * total
    chi_square = ((torch.bincount(tokens, minlength=4) - expected) ** 2 / expected).sum()
    assert chi_square < 16.3, "p < 0.001 for three degrees of freedom"


def test_draws_of_one_seed_differ_from_place_to_place_but_not_from_run_to_run() -> None:
    places = [uniform(3, position) for position in range(1000)]
    assert len(set(places)) == 1000
    assert places == [uniform(3, position) for position in range(1000)]
    assert uniform(3, 0) != uniform(4, 0)


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_any_seed_of_64_bits_gives_numbers_below_one_that_fill_the_range(seed: int) -> None:
    numbers = torch.tensor([uniform(seed, position) for position in [*range(4000), 2**31]], dtype=torch.float64)
    assert 0 <= numbers.min() < 0.01
    assert 0.99 < numbers.max() < 1
    counts = torch.histc(numbers, bins=16, min=0, max=1)
    assert ((counts - len(numbers) / 16) ** 2 / (len(numbers) / 16)).sum() < 37.7, "p < 0.001 for 15 degrees of freedom"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_without_a_finite_best_gets_no_token_and_harms_no_other(bad: float) -> None:
    logits = random_logits(3, rows=4)
    items = [sequence(Sampling(temperature=t), seed=number) for number, t in enumerate((0, 1, 0, 1))]
    whole = choose(logits.clone(), items)
    logits[1, 7 if bad != -math.inf else slice(None)] = bad
    logits[2, 7 if bad != -math.inf else slice(None)] = bad
    assert choose(logits, items) == [whole[0], NO_TOKEN, NO_TOKEN, whole[3]]


def test_batch_mates_change_no_choice() -> None:
    logits = random_logits(5, rows=4)
    samplings = [Sampling(temperature=0), Sampling(top_p=0.5), Sampling(top_k=4, temperature=1.5), Sampling(repetition_penalty=1.3)]
    items = [sequence(sampling, seed=number) for number, sampling in enumerate(samplings)]
    together = sample(logits.clone(), items)
    alone = [sample(logits[row : row + 1].clone(), [item])[0] for row, item in enumerate(items)]
    assert together == alone


def test_logprobs_are_the_models_own_whatever_the_sampling() -> None:
    logits = random_logits(2, rows=2)
    own = torch.log_softmax(logits, -1)
    plain, steered = Sampling(temperature=0, logprobs=2), Sampling(temperature=0, logprobs=0, logit_bias=((11, 100.0),))
    first, second = sample(logits.clone(), [sequence(plain), sequence(steered)])
    assert math.isclose(first.logprob or 0, float(own[0, first.token]), rel_tol=1e-5)
    assert [token for token, _ in first.top] == own[0].topk(2).indices.tolist()
    assert (second.token, second.top) == (11, ())
    assert math.isclose(second.logprob or 0, float(own[1, 11]), rel_tol=1e-5)


def test_rows_that_stay_on_their_device_get_the_tokens_that_they_get_here() -> None:
    ways = [
        Sampling(temperature=0.0),
        Sampling(temperature=0.8, top_p=0.9),
        Sampling(temperature=0.0, repetition_penalty=1.3, logprobs=2),
        Sampling(temperature=0.0),
        Sampling(temperature=0.0, logit_bias=((3, 50.0),)),
        Sampling(temperature=0.0, min_tokens=5),
    ]
    rows = [sequence(way, stop_ids=frozenset({7})) for way in ways]
    logits = random_logits(3, len(rows))
    logits[5, 7] = 99.0
    assert sample_there(logits.clone(), rows) == sample_here(logits.clone(), rows)
    assert sample_there(logits.clone(), rows)[5].token != 7


def bits(*tokens: int) -> Allowed:
    """Only these, of SIZE; what lies beyond says that everything is."""
    found = np.zeros(-(-SIZE // 32) * 32, np.bool_)
    found[list(tokens)] = found[SIZE:] = True
    return np.packbits(found, bitorder="little").view("<u4").astype(np.uint32)


@given(st.sets(st.integers(0, SIZE - 1)), st.integers(1, SIZE))
@limits(deadline=None)
def test_a_bit_is_a_token_and_bits_beyond_the_vocabulary_are_none(tokens: set[int], width: int) -> None:
    assert np.flatnonzero(unpacked(bits(*tokens), width)).tolist() == sorted(token for token in tokens if token < width)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_leaves_the_best_of_what_it_allows(temperature: float) -> None:
    logits = random_logits(4, rows=3)
    items = [sequence(Sampling(temperature=temperature), seed=number) for number in range(3)]
    free = [token.token for token in sample(logits.clone(), items)]
    held = [token.token for token in sample(logits.clone(), items, allowed={1: bits(6, 41)})]
    assert held[::2] == free[::2]
    assert held[1] in (6, 41)
    if not temperature:
        assert held[1] == (6 if logits[1, 6] > logits[1, 41] else 41)


@pytest.mark.parametrize("how", [{}, {"logit_bias": ((3, 100.0),)}, {"min_tokens": 9}, {"logprobs": 2}])
def test_a_row_in_which_nothing_is_allowed_gives_no_token(how: dict) -> None:
    row = sequence(Sampling(temperature=0, **how), stop_ids=frozenset({7}))
    assert sample(random_logits(1), [row], allowed={0: bits()})[0].token == NO_TOKEN


def test_neither_bias_nor_penalty_lifts_a_mask() -> None:
    row = sequence(Sampling(temperature=0, logit_bias=((3, 100.0),), repetition_penalty=1.5, logprobs=1))
    logits = random_logits(1)
    (found,) = sample(logits.clone(), [row], allowed={0: bits(8)})
    assert found.token == 8
    assert found.logprob == pytest.approx(float(torch.log_softmax(logits[0], -1)[8])), "the model's own"


def test_a_form_that_leaves_only_its_end_may_end_early() -> None:
    row = sequence(Sampling(temperature=0, min_tokens=9), stop_ids=frozenset({7}))
    assert sample(random_logits(1), [row], allowed={0: bits(7)})[0].token == 7
    assert sample(random_logits(1), [row], allowed={0: bits(7, 9)})[0].token == 9


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_poison_under_a_mask_is_found(bad: float) -> None:
    logits = random_logits(1, rows=2)
    logits[0, 7] = bad
    found = sample(logits, [sequence(Sampling(temperature=0))] * 2, allowed={0: bits(8), 1: bits(8)})
    assert [row.token for row in found] == [NO_TOKEN, 8]
