"""The compiled sampler against the readable one."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st

from cluster.types import Sampling
from deployments.engine.native.sampling import NativeSampler
from deployments.engine.sampler import READABLE, Sampled, Wanted, choose, forbid, sample, truncate, uniform
from deployments.engine.sequence import NO_TOKEN, Sequence
from deployments.engine.structured import Allowed


@pytest.fixture(scope="module")
def compiled(cache: Path) -> NativeSampler:
    return NativeSampler(cache, threads=2)


def sequences(*samplings: Sampling, stop_ids: frozenset[int] = frozenset()) -> list[Sequence]:
    return [
        Sequence(0, number, [1, 2, 2], 2, sampling, max_tokens=10, stop_ids=stop_ids, seed=number)
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
    for row, (found, expected) in enumerate(zip(compiled.choose(logits, items), choose(logits.clone(), items), strict=True)):
        if found != expected:
            assert is_near_a_limit(logits[row], samplings[row], uniform(row, 0)), f"{samplings[row]}: {found}, not {expected}"


def masks(rows: int, size: int, share: float, seed: int) -> dict[int, Allowed]:
    """Of all rows but every third, each bit set with the chance `share`; those beyond the vocabulary, too."""
    dice = np.random.default_rng(seed)
    words = -(-size // 32) + 1
    bits = dice.random((rows, words, 32)) < share
    packed = np.packbits(bits, axis=-1, bitorder="little").view("<u4")[:, :, 0].astype(np.uint32)
    packed[:, -1] = 0xFFFFFFFF
    return {row: packed[row] for row in range(rows) if row % 3 != 2}


HELD = st.fixed_dictionaries(
    {
        "size": st.sampled_from([1, 15, 16, 17, 31, 32, 33, 511, 513, 3000]),
        "share": st.sampled_from([0.0, 0.002, 0.1, 0.9, 1.0]),
        "poison": st.sampled_from([None, None, None, math.nan, math.inf, -math.inf]),
        "seed": st.integers(0, 999),
    }
)


def held(size: int, share: float, poison: float | None, seed: int, rows: int) -> tuple[torch.Tensor, dict[int, Allowed]]:
    logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3
    if poison is not None:
        logits[seed % rows, seed % size] = poison
    return logits, masks(rows, size, share, seed)


def forbidden(logits: torch.Tensor, items: list[Sequence], allowed: Mapping[int, Allowed]) -> torch.Tensor:
    logits = logits.clone()
    forbid(logits, items, allowed)
    return logits


def agree(found: list[Sampled], expected: list[Sampled], logits: torch.Tensor, items: list[Sequence]) -> None:
    """Same tokens and numbers, except where rounding alone could decide."""
    for row, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one.token != other.token and items[row].sampling.temperature > 0:
            number = uniform(items[row].seed, items[row].num_output)
            assert is_near_a_limit(logits[row], items[row].sampling, number), f"{items[row].sampling}: {one}, not {other}"
        else:
            same(one, other)


def same(one: Sampled, other: Sampled) -> None:
    """The same token with the same report, but for rounding and the order of equals."""
    assert one.token == other.token
    assert one.logprob == (other.logprob if other.logprob is None else pytest.approx(other.logprob, abs=1e-4))
    assert len(one.top) == len(other.top)
    for (token, logprob), (other_token, other_logprob) in zip(one.top, other.top, strict=True):
        assert logprob == pytest.approx(other_logprob, abs=1e-4)
        assert token == other_token or other_logprob == -math.inf


@limits(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samplings=st.lists(SAMPLINGS, min_size=1, max_size=5), held_to=HELD)
def test_masks_allow_the_same_tokens(compiled: NativeSampler, samplings: list[Sampling], held_to: dict) -> None:
    items = sequences(*samplings)
    logits, allowed = held(**held_to, rows=len(items))
    found = compiled.choose(logits, items, allowed)
    for row, bits in allowed.items():
        assert found[row] == NO_TOKEN or (found[row] < logits.shape[1] and bits[found[row] // 32] >> found[row] % 32 & 1)
    expected = choose(logits.clone(), items, allowed)
    agree(list(map(Sampled, found)), list(map(Sampled, expected)), forbidden(logits, items, allowed), items)


STEERED = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7]),
    logit_bias=st.sampled_from([(), ((0, 100.0),), ((0, -100.0), (3, 100.0))]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 1.0]),
    logprobs=st.sampled_from([None, 0, 3]),
    min_tokens=st.sampled_from([0, 5]),
)


@limits(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samplings=st.lists(STEERED, min_size=1, max_size=4), held_to=HELD, stops=st.sampled_from([(), (1,), tuple(range(20))]))
def test_what_else_was_asked_for_stands_beside_a_mask(
    compiled: NativeSampler, samplings: list[Sampling], held_to: dict, stops: tuple[int, ...]
) -> None:
    held_to["size"] = max(20, held_to["size"])
    items = sequences(*samplings, stop_ids=frozenset(stops))
    logits, allowed = held(**held_to, rows=len(items))
    found = sample(logits.clone(), items, compiled, allowed)
    left = logits.clone()
    expected = sample(left, items, READABLE, allowed)  # leaves what it chose from in `left`
    agree(found, expected, left, items)


def test_a_mask_of_another_vocabulary_is_refused(compiled: NativeSampler) -> None:
    with pytest.raises(ValueError, match="no mask"):
        compiled.choose(torch.zeros(1, 33), sequences(Sampling()), {0: np.ones(1, np.uint32)})


def test_held_rows_on_two_threads_are_those_of_each_alone(compiled: NativeSampler) -> None:
    logits, allowed = held(5000, 0.3, None, 1, rows=40)
    items = sequences(*[Sampling(temperature=number % 3, top_p=0.9, top_k=number % 5 * 10) for number in range(40)])
    alone = [
        compiled.choose(logits[[row]], [item], {0: allowed[row]} if row in allowed else {})[0] for row, item in enumerate(items)
    ]
    assert compiled.choose(logits, items, allowed) == alone


def test_many_rows_on_two_threads_are_those_of_each_alone(compiled: NativeSampler) -> None:
    logits = torch.randn(40, 5000, generator=torch.Generator().manual_seed(1))
    items = sequences(*[Sampling(temperature=number % 3, top_p=0.9, top_k=number % 5 * 10) for number in range(40)])
    alone = [compiled.choose(logits[[row]], [item])[0] for row, item in enumerate(items)]
    assert compiled.choose(logits, items) == alone


@pytest.mark.parametrize("way", ["compiled", "readable"])
def test_equal_tokens_are_cut_by_their_place(compiled: NativeSampler, way: str) -> None:
    sampler = compiled if way == "compiled" else READABLE
    items = sequences(*[Sampling(top_k=3)] * 300)
    chosen = sampler.choose(torch.zeros(300, 50), items)
    assert len(set(chosen)) == 3
    if way == "compiled":
        assert set(chosen) == {0, 1, 2}


def test_draws_follow_the_truncated_softmax(compiled: NativeSampler) -> None:
    total, logits = 20_000, torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    chosen = torch.tensor(compiled.choose(logits.expand(total, -1).contiguous(), sequences(*[Sampling(top_k=4)] * total)))
    expected = torch.cat([logits[:4].softmax(-1), torch.zeros(1)]) * total
    counts = torch.bincount(chosen, minlength=5)
    assert counts[4] == 0
    assert ((counts - expected)[:4] ** 2 / expected[:4]).sum() < 16.3, "p < 0.001 for three degrees of freedom"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 20, 31])
def test_a_row_that_is_not_finite_gets_no_token(compiled: NativeSampler, bad: float, column: int) -> None:
    logits = torch.zeros(2, 32)
    logits[1, column] = bad
    assert compiled.choose(logits, sequences(Sampling(), Sampling()))[1] == NO_TOKEN
    assert compiled.choose(logits, sequences(Sampling(temperature=0), Sampling(temperature=0))) == [0, NO_TOKEN]


def test_a_row_without_any_token_left_gets_none(compiled: NativeSampler) -> None:
    assert compiled.choose(torch.full((1, 40), -math.inf), sequences(Sampling())) == [NO_TOKEN]


@limits(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samplings=st.lists(STEERED, min_size=1, max_size=4),
    size=st.sampled_from([4, 15, 16, 17, 513, 3000]),
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    num_prompt=st.integers(0, 40),
    poison=st.sampled_from([0.0, math.nan, math.inf, -math.inf]),
)
def test_penalties_and_bias_are_the_readable_ones(
    compiled: NativeSampler, samplings: list[Sampling], size: int, tokens: list[int], num_prompt: int, poison: float
) -> None:
    items = [
        Sequence(0, number, tokens, min(num_prompt, len(tokens)), sampling, 100, frozenset({2, size - 1}), number)
        for number, sampling in enumerate(samplings)
    ]
    logits = torch.randn(len(items), size, generator=torch.Generator().manual_seed(size))
    logits[-1, size // 2] = poison
    found, expected, rows = logits.clone(), logits.clone(), range(0, len(items), 2)
    assert compiled.adjust(found, items, rows) == READABLE.adjust(expected, items, rows)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_tokens_that_the_model_does_not_have_are_left_alone(compiled: NativeSampler) -> None:
    steered = Sampling(logit_bias=((-1, 5.0), (40, 5.0)), repetition_penalty=2.0, min_tokens=9)
    item = Sequence(0, 0, [1, 2, 70, -3], 2, steered, 100, frozenset({41, 99}), 0)
    logits = torch.ones(3, 40)
    assert compiled.adjust(logits, [item] * 3, [1]) == []
    assert (logits == 1).sum(1).tolist() == [40, 38, 40]


@pytest.mark.parametrize("size", [1, 16, 17, 511, 3000])
@pytest.mark.parametrize("count", [0, 1, 7, 20])
def test_log_probabilities_are_those_of_a_softmax(compiled: NativeSampler, size: int, count: int) -> None:
    logits = torch.randn(40, size, generator=torch.Generator().manual_seed(size)) * 5
    logits[:, ::3] = logits[:, :1].clone()  # equals, the first of which comes first
    logits[::2, 1::5] = -math.inf
    wanted = [Wanted(row, row % size, (count + row) % 21) for row in range(0, 40, 3)]
    for each, one, other in zip(wanted, compiled.report(logits, wanted), READABLE.report(logits, wanted), strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-4)
        expected = logits[each.row].sort(descending=True, stable=True).indices[: each.best]
        assert [token for token, _ in one.top] == expected.tolist()


def test_logits_of_another_kind_are_refused(compiled: NativeSampler) -> None:
    for logits in (torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(8, 2).T):
        with pytest.raises(ValueError, match="contiguous float32"):
            compiled.report(logits, [Wanted(0, 0, 1)])


def test_a_row_of_nothing_but_minus_infinity_is_not_finite(compiled: NativeSampler) -> None:
    logits = torch.full((2, 20), -math.inf)
    logits[0, 19] = 0.0
    assert compiled.adjust(logits, sequences(Sampling(), Sampling()), [0, 1]) == [1]


def bound_threads() -> Counter[tuple[int, ...]]:
    """Of this process's threads that may not run on all of its cores, where they may."""
    found: Counter[tuple[int, ...]] = Counter()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            found[tuple(sorted(os.sched_getaffinity(int(task.name))))] += 1
    del found[tuple(sorted(os.sched_getaffinity(0)))]
    return found


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_threads_have_a_core_each_where_there_are_as_many(cache: Path) -> None:
    own, before = os.sched_getaffinity(0), bound_threads()
    sampler = NativeSampler(cache, threads=len(own))
    sampler.choose(torch.randn(64, 3000), sequences(*[Sampling(temperature=1.0)] * 64))
    assert os.sched_getaffinity(0) == own, "the caller's thread is bound for the call alone"
    assert bound_threads() - before == Counter((core,) for core in sorted(own)[1:])
    del sampler
    unbound = NativeSampler(cache, threads=len(own) + 1)
    unbound.choose(torch.randn(64, 3000), sequences(*[Sampling(temperature=1.0)] * 64))
    assert bound_threads() == before
