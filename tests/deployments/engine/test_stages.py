"""Where ranks stand, and which layers a stage has: everything once, in order, and the heaviest stage as light as can be."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.stages import Place, split


@given(tp=st.integers(1, 4), pp=st.integers(1, 5))
def test_every_part_of_every_stage_has_one_rank(tp: int, pp: int) -> None:
    places = [Place(rank, tp, pp) for rank in range(tp * pp)]
    assert {(place.stage, place.part) for place in places} == {(stage, part) for stage in range(pp) for part in range(tp)}
    assert places[0].is_last, "the leader samples, so it has the logits"
    assert places[-1].is_first
    for place in places:
        assert [places[rank].stage for rank in place.peers] == [place.stage] * tp
        if not place.is_first:
            assert (places[place.before].stage, places[place.before].part) == (place.stage - 1, place.part)
            assert places[place.before].behind == place.rank


def heaviest(layers: list[int], ends: tuple[int, ...], before: int, behind: int) -> int:
    sums = [sum(layers[a:b]) for a, b in pairwise(ends)]
    sums[0] += before
    sums[-1] += behind
    return max(sums)


@given(
    layers=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    pp=st.integers(1, 5),
    before=st.integers(0, 20),
    behind=st.integers(0, 20),
)
def test_no_other_cut_has_a_lighter_heaviest_stage(layers: list[int], pp: int, before: int, behind: int) -> None:
    pp = min(pp, len(layers))
    found = split(layers, pp, before=before, behind=behind)
    assert [number for run in found for number in run] == list(range(len(layers)))
    assert all(found)
    cuts = [(0, *inner, len(layers)) for inner in combinations(range(1, len(layers)), pp - 1)]
    ends = (0, *[run.stop for run in found])
    assert heaviest(layers, ends, before, behind) == min(heaviest(layers, cut, before, behind) for cut in cuts)


def test_what_is_left_is_spread_evenly() -> None:
    assert sorted(map(len, split([1] * 10, 4))) == [2, 2, 3, 3]
    assert [len(run) for run in split([1] * 24, 4, before=2, behind=2)] == [5, 7, 7, 5]


@pytest.mark.parametrize("pp", [0, 4])
def test_a_stage_without_a_layer_is_refused(pp: int) -> None:
    with pytest.raises(ValueError, match="3 layers"):
        split([1, 1, 1], pp)
