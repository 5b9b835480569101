"""Which batch sizes get a graph, and which graph a batch takes. Policies over numbers."""

from __future__ import annotations

from collections.abc import Sequence as Items

STEP = 16
"""From here on sizes grow by addition: a batch is filled up by less than an eighth, once it is large."""
MOST = 512


def sizes(max_sequences: int) -> list[int]:
    """1, 2, 4, 8, 16, 32, 48, ... and the largest batch itself, in order."""
    largest = min(max_sequences, MOST)
    doubled = [size for size in (1, 2, 4, 8) if size < largest]
    return [*doubled, *range(STEP, largest, STEP), largest]


def bucket(count: int, available: Items[int]) -> int | None:
    """The smallest of the ordered sizes that holds so many; None when none does."""
    return next((size for size in available if size >= count), None)
