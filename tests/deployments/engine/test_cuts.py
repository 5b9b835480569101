"""From DeepSpeed's notes to blocks: any cut along any dimension is found again, and what adds up to nothing is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.checkpoint.affine import block_gather_map, contiguous_split_map, replicated_map, segmented_map, sub_param_map
from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.cuts import Cut, CutUnknown, learn

Sizes = st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any)


def noted(name: str, part: torch.Tensor, note: Any) -> Any:
    """A model of one parameter, with DeepSpeed's note on it."""
    parameter = torch.nn.Parameter(part, requires_grad=False)
    setattr(parameter, DS_AUTOTP_UC_META, {"conversion": note})
    return SimpleNamespace(state_dict=lambda keep_vars: {name: parameter})


def check(layout: Any, shape: tuple[int, ...], ranks: int) -> None:
    """Our blocks take what DeepSpeed itself extracts with its note."""
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for rank in range(ranks):
        expected = layout.extract(whole, rank)
        model = noted("x", expected.to("meta"), {"affine_map": layout.to_dict()})
        (cut,) = learn(model, {"x": shape}, rank).values()
        assert torch.equal(cut.take(whole, whole.dtype), expected)


@given(Sizes, st.integers(1, 4), st.integers(0, 1))
def test_contiguous_cuts(sizes: list[int], other: int, dimension: int) -> None:
    shape = (sum(sizes), other) if dimension == 0 else (other, sum(sizes))
    check(contiguous_split_map(shape, sizes, dimension), shape, len(sizes))


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=3), st.integers(0, 1))
def test_cuts_of_fused_matrices(widths: list[tuple[int, ...]], dimension: int) -> None:
    sizes = [sum(split) for split in widths]
    shape = (sum(sizes), 3) if dimension == 0 else (3, sum(sizes))
    check(sub_param_map(shape, sizes, widths, dimension), shape, 3)


def test_other_layouts_of_deepspeed() -> None:
    check(replicated_map((3, 4), 2), (3, 4), 2)
    check(segmented_map((10, 4), [(6, False), (4, True)], 0, 2, [[4, 2]]), (10, 4), 2)
    check(block_gather_map((8, 3), {0: [0, 2], 1: [1, 3]}, 2, 0), (8, 3), 2)


@pytest.mark.parametrize(
    ("note", "part", "reason"),
    [
        ({"affine_map": None, "unsupported_reason": "woven"}, (4, 4), "woven"),
        ({"affine_map": contiguous_split_map((8, 4), [4, 4], 0).to_dict()}, (8, 2), "shape"),
        ({"affine_map": contiguous_split_map((6, 4), [3, 3], 0).to_dict()}, (3, 4), "not \\(8, 4\\)"),
        ({"affine_map": replicated_map((8, 4), 2, scale=0.5).to_dict()}, (8, 4), "scales"),
    ],
)
def test_what_does_not_add_up_is_unknown(note: dict[str, Any], part: tuple[int, ...], reason: str) -> None:
    with pytest.raises(CutUnknown, match=reason):
        learn(noted("x", torch.empty(part, device="meta"), note), {"x": (8, 4)}, 0)


def test_a_part_that_is_no_block_is_unknown() -> None:
    layout = contiguous_split_map((8, 4), [4, 4], 0).to_dict()
    layout["ranks"][0]["pieces"][0]["source"] = [0, [8, 1]]  # every second row
    with pytest.raises(CutUnknown, match="not made of blocks"):
        learn(noted("x", torch.empty(4, 4, device="meta"), {"affine_map": layout}), {"x": (8, 4)}, 0)


def test_a_tensor_without_a_note_is_whole() -> None:
    model = SimpleNamespace(state_dict=lambda keep_vars: {"x": torch.empty(3, 2, device="meta")})
    assert learn(model, {"x": (3, 2)}, 1) == {"x": Cut.none((3, 2))}
