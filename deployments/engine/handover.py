"""What goes from stage to stage: hidden states of a step's tokens, from each rank to the one with the same part in the next stage.

Steps come in the same order to all, so a message needs no name. A stage goes on to its next step while the last one's states are
still on their way.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deployments.engine.stages import Place


class Handover:
    """One rank's ends of it, over sockets. Calls raise RuntimeError when the other rank has ended."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._leaving: tuple[Tensor, Any] | None = None
        self.waited_s = 0.0
        """Seconds that this rank waited for the stage before it: its idle time, and the way of the states."""

    def take(self, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
        """`tokens x width` from the stage before."""
        hidden = torch.empty(tokens, width, dtype=dtype)
        began = time.perf_counter()
        dist.recv(_bytes(hidden), self._place.before)
        self.waited_s += time.perf_counter() - began
        return hidden

    def give(self, hidden: Tensor) -> None:
        """To the next stage. `hidden` must not change any more."""
        if self._leaving:
            self._leaving[1].wait()
        hidden = hidden.contiguous()
        self._leaving = hidden, dist.isend(_bytes(hidden), self._place.behind)


def _bytes(tensor: Tensor) -> Tensor:
    """gloo knows not every type."""
    return tensor.view(-1).view(torch.uint8)
