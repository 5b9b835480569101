"""One step's numbers on a device: a `Batch` and all that follows from it, packed on the host and sent in one copy.

Everything is int32 and a view of one buffer. T new tokens of S sequences, R rows whose logits are wanted, P programs of attention
(`kernel.py`), W blocks in a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deployments.engine.attention import batch_positions
from deployments.engine.batch import Batch, Ints

ROWS = 128
"""Query rows of one program of attention; those of one token's heads that share a key/value head stand together."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A run of programs that are alike."""

    first: int
    count: int
    tokens_each: int
    splits: int


@dataclass(frozen=True, slots=True)
class Step:
    """What the model and its attention read."""

    tokens: Tensor  # T
    positions: Tensor  # T
    slots: Tensor  # T: where each new token's key and value go
    rows: Tensor  # R
    firsts: Tensor  # S: its first new token among the T
    starts: Tensor  # S: its tokens that are in the cache already
    counts: Tensor  # S: its new tokens
    programs: Tensor  # P x 2: sequence, and the first of the sequence's new tokens
    tables: Tensor  # S x W
    launches: tuple[Launch, ...]
    block_size: int


@dataclass(frozen=True, slots=True)
class Packed:
    """A step on the host: `fixed`, whose length hangs on the number of sequences alone where each has one token, then tables."""

    numbers: Ints
    lengths: tuple[int, ...]  # of the parts, in the order of `Step`; the tables last
    width: int
    launches: tuple[Launch, ...]
    block_size: int

    @property
    def num_fixed(self) -> int:
        return sum(self.lengths[:-1])

    def sent(self, device: torch.device) -> Tensor:
        """The numbers on the device. From pinned memory, which torch keeps until the copy is done: the host doesn't wait."""
        numbers = torch.from_numpy(self.numbers)
        return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers

    def step(self, fixed: Tensor, tables: Tensor) -> Step:
        """Views of `fixed`, and tables that may be wider than these."""
        tokens, positions, slots, rows, firsts, starts, counts, programs = fixed.split(self.lengths[:-1])  # type: ignore[no-untyped-call]
        programs = programs.view(-1, 2)
        return Step(tokens, positions, slots, rows, firsts, starts, counts, programs, tables, self.launches, self.block_size)


def pack(batch: Batch, block_size: int, group: int, processors: int, kv_heads: int) -> Packed:
    """`group` query heads share a key/value head, of which this rank has `kv_heads`; the device has so many `processors`."""
    positions = batch_positions(batch)
    sequences = np.repeat(np.arange(len(batch.counts)), batch.counts)
    slots = batch.tables[sequences, positions // block_size] * block_size + positions % block_size
    firsts = np.cumsum(batch.counts) - batch.counts
    programs, launches = _programs(batch.counts, max(1, ROWS // group), processors, kv_heads)
    parts = [batch.tokens, positions, slots, batch.rows, firsts, batch.starts, batch.counts, programs.ravel(), batch.tables.ravel()]
    numbers = np.concatenate([part.astype(np.int32, copy=False) for part in parts])
    return Packed(numbers, tuple(len(part) for part in parts), batch.tables.shape[1], launches, block_size)


def padded(batch: Batch, size: int, scratch: int) -> Batch:
    """Decoders, filled up to `size` with sequences of one token that use the block `scratch` alone; all give logits."""
    more = size - len(batch.starts)
    tables = np.concatenate([batch.tables, np.full((more, batch.tables.shape[1]), scratch, np.int32)])
    tokens, starts = (np.concatenate([part, np.zeros(more, np.int32)]) for part in (batch.tokens, batch.starts))
    return Batch(tokens, starts, np.ones(size, np.int32), np.arange(size, dtype=np.int32), tables)


def splits(programs: int, processors: int) -> int:
    """Programs that share one's pages, so that about two work on each processor; a power of two."""
    most = 1
    while most < 32 and 2 * most * programs <= 2 * processors:
        most *= 2
    return most


def _programs(counts: Ints, tokens_each: int, processors: int, kv_heads: int) -> tuple[Ints, tuple[Launch, ...]]:
    """Decoders first, one program each; the others' new tokens by `tokens_each`."""
    decoders = int(np.argmax(counts > 1)) if (counts > 1).any() else len(counts)
    found = [(row, 0) for row in range(decoders)] + list(_pieces(counts, decoders, tokens_each))
    launches = []
    for first, count, each in ((0, decoders, 1), (decoders, len(found) - decoders, tokens_each)):
        if count:
            launches.append(Launch(first, count, each, splits(count * kv_heads, processors)))
    return np.array(found, np.int32).reshape(-1, 2), tuple(launches)


def _pieces(counts: Ints, first: int, tokens_each: int) -> Iterator[tuple[int, int]]:
    for row, count in enumerate(counts[first:].tolist(), first):
        yield from ((row, begin) for begin in range(0, count, tokens_each))
