"""How many blocks of keys and values fit beside the rest on a GPU. A policy over bytes."""

from __future__ import annotations


def blocks_that_fit(*, free: int, total: int, share: float, step: int, graphs: bool, block: int) -> int:
    """`free` bytes with the weights in place, of `total`, of which `share` may be filled; the largest `step` takes so many more,
    and graphs keep as much again. 0 or less: not even the rest fits."""
    room = free - int((1 - share) * total) - step * (2 if graphs else 1)
    return room // block
