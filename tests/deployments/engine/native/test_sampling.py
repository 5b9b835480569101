"""The compiled sampler against the readable one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st

from cluster.types import Sampling
from deployments.engine.native.sampling import NativeSampler
from deployments.engine.sampler import Choose, choose, truncate, uniform
from deployments.engine.sequence import NO_TOKEN, Sequence


@pytest.fixture(scope="module")
def compiled(cache: Path) -> NativeSampler:
    return NativeSampler(cache, threads=2)


def sequences(*samplings: Sampling) -> list[Sequence]:
    return [
        Sequence(0, number, [1, 2], 2, sampling, max_tokens=10, stop_ids=frozenset(), seed=number)
        for number, sampling in enumerate(samplings)
    ]


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-4, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 40, 10_000]),
    top_p=st.sampled_from([0.0, 1e-6, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
)


def is_near_a_limit(logits: torch.Tensor, sampling: Sampling, number: float) -> bool:
    """Whether rounding alone could decide: the drawn number, or top-p, lies where one token ends and the next begins."""
    row = (logits.double() / sampling.temperature)[None]
    ordered = row.softmax(-1).sort(-1, descending=True).values
    kept = ordered[:, : sampling.top_k or None]
    sums = (kept / kept.sum()).cumsum(-1)
    ends = truncate(row, [sampling]).softmax(-1).cumsum(-1)
    return bool((sums - sampling.top_p).abs().min() < 1e-5 or (ends - number).abs().min() < 1e-5)


@limits(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samplings=st.lists(SAMPLINGS, min_size=1, max_size=5),
    size=st.sampled_from([1, 15, 16, 17, 511, 513, 3000]),
    spread=st.sampled_from([0.01, 1.0, 20.0]),
    seed=st.integers(0, 999),
)
def test_the_same_tokens(compiled: NativeSampler, samplings: list[Sampling], size: int, spread: float, seed: int) -> None:
    logits = torch.randn(len(samplings), size, generator=torch.Generator().manual_seed(seed)) * spread
    logits[:, ::7] = -math.inf
    logits[:, -1] = 0.5
    items = sequences(*samplings)
    for row, (found, expected) in enumerate(zip(compiled(logits, items), choose(logits.clone(), items), strict=True)):
        if found != expected:
            assert is_near_a_limit(logits[row], samplings[row], uniform(row, 0)), f"{samplings[row]}: {found}, not {expected}"


def test_many_rows_on_two_threads_are_those_of_each_alone(compiled: NativeSampler) -> None:
    logits = torch.randn(40, 5000, generator=torch.Generator().manual_seed(1))
    items = sequences(*[Sampling(temperature=number % 3, top_p=0.9, top_k=number % 5 * 10) for number in range(40)])
    alone = [compiled(logits[[row]], [item])[0] for row, item in enumerate(items)]
    assert compiled(logits, items) == alone


@pytest.mark.parametrize("way", ["compiled", "readable"])
def test_equal_tokens_are_cut_by_their_place(compiled: NativeSampler, way: str) -> None:
    pick: Choose = compiled if way == "compiled" else choose
    items = sequences(*[Sampling(top_k=3)] * 300)
    chosen = pick(torch.zeros(300, 50), items)
    assert len(set(chosen)) == 3
    if way == "compiled":
        assert set(chosen) == {0, 1, 2}


def test_draws_follow_the_truncated_softmax(compiled: NativeSampler) -> None:
    total, logits = 20_000, torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    chosen = torch.tensor(compiled(logits.expand(total, -1), sequences(*[Sampling(top_k=4)] * total)))
    expected = torch.cat([logits[:4].softmax(-1), torch.zeros(1)]) * total
    counts = torch.bincount(chosen, minlength=5)
    assert counts[4] == 0
    assert ((counts - expected)[:4] ** 2 / expected[:4]).sum() < 16.3, "p < 0.001 for three degrees of freedom"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 20, 31])
def test_a_row_that_is_not_finite_gets_no_token(compiled: NativeSampler, bad: float, column: int) -> None:
    logits = torch.zeros(2, 32)
    logits[1, column] = bad
    assert compiled(logits, sequences(Sampling(), Sampling()))[1] == NO_TOKEN
    assert compiled(logits, sequences(Sampling(temperature=0), Sampling(temperature=0))) == [0, NO_TOKEN]


def test_a_row_without_any_token_left_gets_none(compiled: NativeSampler) -> None:
    assert compiled(torch.full((1, 40), -math.inf), sequences(Sampling())) == [NO_TOKEN]
