"""Linears of a transformers module that add what adapters say, rows of each adapter together: the readable form, and the
specification of the compiled one (`native/low_rank.h`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deployments.engine.adapters import AdapterPart
from deployments.engine.batch import Batch


class Adapted:
    """A module with slots for adapters. It costs nothing before the first adapter, and little in steps without one."""

    def __init__(self, model: nn.Module, all_reduce: Callable[[Tensor], None] | None) -> None:
        """`all_reduce` sums a float32 tensor over all ranks, in place; None: this rank is alone."""
        self._model, self._all_reduce = model, all_reduce
        self._slots: dict[int, AdapterPart] = {}
        self._hooked: set[str] = set()
        self._rows: list[tuple[int, Tensor]] = []  # of the current step: slot, rows

    def put(self, slot: int, part: AdapterPart | None) -> None:
        if part is None:
            self._slots.pop(slot, None)
            return
        self._slots[slot] = part
        for name in part.pairs.keys() - self._hooked:
            self._model.get_submodule(name).register_forward_hook(self._hook(name))
            self._hooked.add(name)

    def begin(self, batch: Batch) -> None:
        """Say which rows of the next step have which adapter."""
        self._rows = [(slot, rows) for slot, rows in _rows_of(batch) if slot in self._slots]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def add(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            changed = [(self._slots[slot], rows) for slot, rows in self._rows if name in self._slots[slot].pairs]
            if not changed:
                return None
            output = output.clone()
            for part, rows in changed:
                output[0, rows] += self._delta(part, name, inputs[0][0, rows])
            return output

        return add

    def _delta(self, part: AdapterPart, name: str, x: Tensor) -> Tensor:
        a, b = part.pairs[name]
        inner = x @ a.T
        cut = part.cuts[name]
        if self._all_reduce and cut.part[1] != cut.whole[1]:  # the linear's own sum over ranks is behind us
            inner = inner.float().contiguous()
            self._all_reduce(inner)
            inner = inner.to(x.dtype)
        return (inner @ b.T) * part.scale


def _rows_of(batch: Batch) -> Iterator[tuple[int, Tensor]]:
    if not batch.adapters.any():
        return
    slots = np.repeat(batch.adapters, batch.counts)
    for slot in np.unique(slots[slots > 0]).tolist():
        yield slot, torch.from_numpy(np.flatnonzero(slots == slot))
