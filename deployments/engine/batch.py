"""One step's work, as every rank receives it: a few small integer arrays that pack into one.

Decoders (one token each) come first; one that tries guesses looks like a piece of a prompt here. Everything else a rank needs
(positions, slots, masks) follows from these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from deployments.engine.scheduler import Slice

Ints = npt.NDArray[np.int32]
NONE: Ints = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """S sequences with T new tokens in all; `tables` is padded with block 0 to W blocks."""

    tokens: Ints  # T
    starts: Ints  # S: tokens of the sequence that are in the cache already
    counts: Ints  # S: its new tokens
    sampled: Ints  # the sequences whose last token's logits are wanted; one that is named n times: those of its last n tokens
    tables: Ints  # S x W
    adapters: Ints = field(default_factory=lambda: NONE)  # S: the slot of each sequence's adapter, 0: none; empty: none has one

    @classmethod
    def of(cls, slices: Items[Slice]) -> Batch:
        width = max(len(item.sequence.blocks) for item in slices)
        tables = bytearray().join([item.sequence.blocks.tobytes().ljust(4 * width, b"\0") for item in slices])
        tokens: list[int] = []
        for item in slices:
            tokens += item.sequence.tokens[item.start : item.start + item.count]
            tokens += item.draft
        return cls(
            np.array(tokens, np.int32),
            np.array([item.start for item in slices], np.int32),
            np.array([item.width for item in slices], np.int32),
            np.array([row for row, item in enumerate(slices) if item.samples for _ in range(1 + len(item.draft))], np.int32),
            np.frombuffer(tables, np.int32).reshape(len(slices), width),
            _adapters(slices),
        )

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Of the T tokens, those whose logits are wanted, as `sampled` names them."""
        from_the_end = np.searchsorted(self.sampled, self.sampled, side="right") - np.arange(len(self.sampled))
        return np.cumsum(self.counts, dtype=np.int64)[self.sampled] - from_the_end

    def pack(self) -> Ints:
        """One array: the five lengths, then the arrays one after the other."""
        sizes = [len(self.tokens), len(self.starts), len(self.sampled), self.tables.shape[1], len(self.adapters)]
        arrays = (self.tokens, self.starts, self.counts, self.sampled, self.tables.ravel(), self.adapters)
        return np.concatenate([np.array(sizes, np.int32), *arrays])

    @classmethod
    def unpack(cls, packed: Ints) -> Batch:
        num_tokens, num_sequences, num_sampled, width, num_adapters = packed[:5].tolist()
        ends = np.cumsum([5, num_tokens, num_sequences, num_sequences, num_sampled, num_sequences * width, num_adapters])
        tokens, starts, counts, sampled, tables, adapters = (packed[a:b] for a, b in pairwise(ends))
        return cls(tokens, starts, counts, sampled, tables.reshape(num_sequences, width), adapters)


def _adapters(slices: Items[Slice]) -> Ints:
    slots = [item.sequence.adapter for item in slices]
    return np.array(slots, np.int32) if any(slots) else NONE
