"""One input of an encoder: a text's tokens, or a pair's. What is encoded together is a list of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int32]
Floats: TypeAlias = npt.NDArray[np.float32]


class Row:
    """Token ids, and the segment of each where there are two."""

    __slots__ = ("ids", "types")

    def __init__(self, ids: Sequence[int], types: Sequence[int] | None = None) -> None:
        self.ids: Ints = np.asarray(ids, np.int32)
        self.types: Ints | None = None if types is None else np.asarray(types, np.int32)

    def __len__(self) -> int:
        return len(self.ids)


def starts_of(rows: Sequence[Row]) -> npt.NDArray[np.int64]:
    """Where each row starts when they lie one behind the other, and where the last one ends."""
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    return starts
