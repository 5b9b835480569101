"""One step's work, as every rank receives it: a few small integer arrays that pack into one.

Decoders (one token each) come first; one that tries guesses looks like a piece of a prompt here. Everything else a rank needs
(positions, slots, masks) follows from these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from deployments.engine.scheduler import Slice

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """S sequences with T new tokens in all; `tables` is padded with block 0 to W blocks."""

    tokens: Ints  # T
    starts: Ints  # S: tokens of the sequence that are in the cache already
    counts: Ints  # S: its new tokens
    sampled: Ints  # the sequences whose last token's logits are wanted; one that is named n times: those of its last n tokens
    tables: Ints  # S x W

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
        )

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Of the T tokens, those whose logits are wanted, as `sampled` names them."""
        from_the_end = np.searchsorted(self.sampled, self.sampled, side="right") - np.arange(len(self.sampled))
        return np.cumsum(self.counts, dtype=np.int64)[self.sampled] - from_the_end

    def pack(self) -> Ints:
        """One array: the four lengths, then the arrays one after the other."""
        lengths = np.array([len(self.tokens), len(self.starts), len(self.sampled), self.tables.shape[1]], np.int32)
        return np.concatenate([lengths, self.tokens, self.starts, self.counts, self.sampled, self.tables.ravel()])

    @classmethod
    def unpack(cls, packed: Ints) -> Batch:
        num_tokens, num_sequences, num_sampled, width = packed[:4].tolist()
        ends = np.cumsum([4, num_tokens, num_sequences, num_sequences, num_sampled, num_sequences * width])
        tokens, starts, counts, sampled, tables = (packed[a:b] for a, b in pairwise(ends))
        return cls(tokens, starts, counts, sampled, tables.reshape(num_sequences, width))
