"""The compiled kernels against the specification on the CPU: every shape that the interpreter tries, and those of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.deployments.engine.gpu.pages import both

DECODERS = [(0, 1), (7, 1), (8, 1), (40, 1), (1000, 1)]
MIXED = [(5, 1), (300, 1), (0, 190), (110, 3), (201, 400)]
LONG = [(9, 1), (20_000, 1), (15_000, 9)]
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check(work: list[tuple[int, int]], dtype: torch.dtype, **options: Any) -> None:
    from deployments.engine.gpu.kernel import attend
    from deployments.engine.gpu.runner import processors

    found, expected = both(attend, work, dtype=dtype, device="cuda", processors=processors(torch.device("cuda")), **options)
    assert found.isfinite().all()
    error = (found - expected).norm() / expected.norm()
    assert error < TOLERANCES[dtype], f"relative error {error:.2g}"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("work", [DECODERS, MIXED, LONG], ids=["decoders", "mixed", "long"])
@pytest.mark.parametrize("options", [{}, {"window": 100}, {"softcap": 20.0}, {"window": 4096, "softcap": 5.0}], ids=str)
def test_it_is_the_specification(work: list[tuple[int, int]], options: dict[str, Any], dtype: torch.dtype) -> None:
    check(work, dtype, heads=8, kv_heads=2, size=64, **options)


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (14, 2), (8, 8), (48, 1), (6, 2), (64, 8)])
def test_heads_share_keys_and_values(heads: int, kv_heads: int) -> None:
    check(MIXED, torch.bfloat16, heads=heads, kv_heads=kv_heads, size=128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "value_size"), [(32, 32), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_heads_of_any_size(size: int, value_size: int, dtype: torch.dtype) -> None:
    check(MIXED, dtype, heads=8, kv_heads=2, size=size, value_size=value_size)


def test_a_step_of_another_size_compiles_nothing_anew() -> None:
    from deployments.engine.gpu import kernel

    def variants() -> int:
        return sum(len(compiled[0]) for compiled in kernel._attend.device_caches.values())

    for length in (16, 17, 18, 19, 20):
        check([(length, 1), (3, length)], torch.bfloat16, size=64)
    before = variants()
    for length in (21, 22, 23, 25):
        check([(length, 1), (3, length)], torch.bfloat16, size=64)
    assert variants() == before
