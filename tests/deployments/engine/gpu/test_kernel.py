"""The kernels against the specification, in Triton's interpreter: the same source that a GPU compiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.deployments.engine.gpu.pages import both

DECODERS = [(0, 1), (7, 1), (8, 1), (40, 1)]
MIXED = [(5, 1), (30, 1), (0, 19), (11, 3), (21, 40)]


@pytest.fixture(scope="module")
def attend() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # before Triton is imported
        pytest.importorskip("triton", reason="the kernels are Triton's, which is not installed")
        from deployments.engine.gpu import kernel

        yield kernel.attend


@pytest.mark.parametrize("work", [DECODERS, MIXED, [(3, 9)]], ids=["decoders", "mixed", "one chunk"])
@pytest.mark.parametrize("options", [{}, {"window": 12}, {"softcap": 5.0}, {"window": 3, "softcap": 2.0}], ids=str)
def test_it_is_the_specification(attend: Any, work: list[tuple[int, int]], options: dict[str, Any]) -> None:
    found, expected = both(attend, work, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (5, 1), (4, 4)], ids=str)
def test_heads_share_keys_and_values(attend: Any, heads: tuple[int, int]) -> None:
    found, expected = both(attend, MIXED, heads=heads[0], kv_heads=heads[1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(8, 8), (24, 24), (24, 16), (80, 80)], ids=str)
def test_heads_of_any_size(attend: Any, sizes: tuple[int, int]) -> None:
    found, expected = both(attend, MIXED, size=sizes[0], value_size=sizes[1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"window": 70}], ids=str)
def test_pages_that_are_dealt_out_to_several_programs(attend: Any, options: dict[str, Any]) -> None:
    found, expected = both(attend, [(3, 1), (200, 1), (150, 5)], processors=64, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_sixteen_bits(attend: Any) -> None:
    found, expected = both(attend, MIXED, dtype=torch.float16)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)
