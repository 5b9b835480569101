"""Packed weights hold the same numbers, in the order that linear.h promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.engine.native import build
from deployments.engine.native.packing import PANEL, Arena, declare, interleave, joined, pack, packed_bytes, padded


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    outputs=st.integers(1, 200),
    lanes=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    threads=st.integers(1, 3),
)
def test_every_weight_is_where_the_decoder_looks_for_it(
    cache: Path, outputs: int, lanes: int, dtype: torch.dtype, threads: int
) -> None:
    library = build.library(cache)
    declare(library)
    per = 4 // dtype.itemsize
    weight = torch.randn(outputs, lanes * per, generator=torch.Generator().manual_seed(outputs)).to(dtype)
    arena = Arena(packed_bytes(outputs, lanes * per, dtype.itemsize))
    packed = pack(weight, arena, library, threads).view(dtype)
    panels = packed.view(-1, lanes, PANEL, per)  # panel, step along k, output, number in the lane
    unpacked = panels.permute(0, 2, 1, 3).reshape(-1, lanes * per)
    assert torch.equal(unpacked[:outputs], weight)
    assert not unpacked[outputs:].any()


def test_an_arena_never_hands_out_more_than_it_has() -> None:
    arena = Arena(packed_bytes(32, 8, 4))
    assert arena.take(32 * 8 * 4).data_ptr() % 64 == 0
    with pytest.raises(AssertionError):
        arena.take(128)


def test_gates_stand_beside_what_they_gate() -> None:
    gate, up = torch.arange(20.0)[:, None], 100 + torch.arange(20.0)[:, None]
    both = interleave(gate, up)[:, 0]
    assert both[:16].tolist() == list(range(16))
    assert both[16:32].tolist() == [100 + i for i in range(16)]
    assert both[32:36].tolist() == [16, 17, 18, 19]
    assert both[48:52].tolist() == [116, 117, 118, 119]
    assert len(both) == 64


def test_biases_of_fused_linears_are_joined_and_filled_up() -> None:
    bias = joined([torch.ones(3), None], [3, 2])
    assert bias is not None
    assert bias.tolist() == [1, 1, 1, 0, 0]
    filled = padded(bias, 5)
    assert filled is not None
    assert filled.tolist() == [1, 1, 1] + [0] * 29
    assert joined([None, None], [3, 2]) is None
