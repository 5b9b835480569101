"""Sequences in pages, drawn at random, and what the specification says of their attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from deployments.engine.attention import AttentionCall, KvCache, Paged, paged_attention
from deployments.engine.batch import Batch
from deployments.engine.gpu.inputs import Step, pack

BLOCK = 8


def batch(work: list[tuple[int, int]], *, seed: int = 0, vocabulary: int = 64, spare: int = 0) -> tuple[Batch, int]:
    """A sequence for each `(start, count)`, decoders first, the shorter the sooner, on shuffled blocks; also how many of these."""
    random = np.random.default_rng(seed)
    needs = [-(-(start + count) // BLOCK) for start, count in work]
    blocks = random.permutation(sum(needs) + spare).astype(np.int32)
    tables = np.zeros((len(work), max(needs)), np.int32)
    for row, need in enumerate(needs):
        tables[row, :need], blocks = blocks[:need], blocks[need:]
    starts, counts = (np.array(column, np.int32) for column in zip(*work, strict=True))
    tokens = random.integers(0, vocabulary, counts.sum()).astype(np.int32)
    return Batch(tokens, starts, counts, np.arange(len(work), dtype=np.int32), tables), sum(needs) + spare


def both(
    attend: Any,
    work: list[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 16,
    value_size: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    processors: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A kernel's answer, and the specification's in float32 on the CPU from the same numbers."""
    found, blocks = batch(work, spare=3)
    generator = torch.Generator().manual_seed(1)
    tokens = len(found.tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query, key = draw(1, heads, tokens, size) * 2, draw(1, kv_heads, tokens, size)
    value = draw(1, kv_heads, tokens, value_size or size)
    pages = draw(blocks * BLOCK, kv_heads, size), draw(blocks * BLOCK, kv_heads, value_size or size)
    options = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}

    def answer(kernel: Any, dtype: torch.dtype, device: str) -> torch.Tensor:
        cache = KvCache(blocks, BLOCK)
        cache._layers[0] = tuple(part.clone().to(device, dtype) for part in pages)  # type: ignore[assignment]
        paged = Paged.of(found, cache, torch.device(device))
        paged.kernel = kernel
        inputs = [part.to(device, dtype) for part in (query, key, value)]
        return paged_attention(SimpleNamespace(layer_idx=0), *inputs, None, paged=paged, **options)[0][0].float().cpu()  # type: ignore[arg-type]

    step = on_device(found, torch.device(device), heads // kv_heads, kv_heads, processors)

    def kernel(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        return attend(queries, keys, values, call, step)

    return answer(kernel, dtype, device), answer(None, torch.float32, "cpu")


def on_device(found: Batch, device: torch.device, group: int, kv_heads: int, processors: int) -> Step:
    packed = pack(found, BLOCK, group, processors, kv_heads)
    numbers = packed.sent(device)
    return packed.step(numbers[: packed.num_fixed], numbers[packed.num_fixed :].view(-1, packed.width))
