"""Decode steps from buffers that never move, so that a CUDA graph can hold the whole step: one launch instead of hundreds.

What is captured is `capture`'s business: given a function without arguments it returns one that does the same work again. On a
CPU nothing is, and the same code runs with the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deployments.engine.adapters import WithoutAdapters
from deployments.engine.batch import Batch
from deployments.engine.gpu.buckets import bucket
from deployments.engine.gpu.inputs import padded
from deployments.engine.gpu.runner import DeviceRunner
from deployments.engine.model_config import rope_types

Body = Callable[[], Tensor]
Capture = Callable[[Body], Body]
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
WARM_UPS = 2
"""Runs before a capture: kernels are compiled and libraries make their workspaces, which a capture may not."""


@dataclass(frozen=True)
class Bucket:
    """The buffers of one batch size, and the step over them."""

    fixed: Tensor
    tables: Tensor
    replay: Body


class StaticDecode(WithoutAdapters):
    """Every decode step of at most `sizes[-1]` sequences; others go to the runner. `width`: blocks of the longest sequence."""

    def __init__(self, runner: DeviceRunner, sizes: list[int], width: int, capture: Capture) -> None:
        self.runner, self.sizes, self.width, self.capture = runner, sizes, width, capture
        self._buckets: dict[int, Bucket] = {}
        self._logits: Tensor | None = None  # of the largest bucket; the others' are its first rows

    @torch.inference_mode()
    def prepare(self) -> None:
        """Make every bucket, the largest first: the others then find room in the memory that it needed meanwhile."""
        self._buckets = {size: self._made(size) for size in reversed(self.sizes)}

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """`R x V` logits, good until the next step."""
        size = bucket(len(batch.counts), self.sizes) if (batch.counts == 1).all() else None
        if size is None:
            return self.runner.run(batch)
        held = self._buckets[size]
        packed = self.runner.packed(padded(batch, size, self.runner.scratch))
        numbers = packed.sent(self.runner.device)
        held.fixed.copy_(numbers[: packed.num_fixed])
        held.tables[:, : packed.width].copy_(numbers[packed.num_fixed :].view(-1, packed.width))
        logits = held.replay()
        if len(batch.sampled) == len(batch.counts):
            return logits[: len(batch.counts)]
        return logits[torch.from_numpy(batch.sampled.astype(np.int64)).to(logits.device)]

    def close(self) -> None:
        """Let go of the graphs, which end with their memory."""
        self._buckets.clear()
        self._logits = None
        self.runner.close()

    @property
    def weight_bytes(self) -> int:
        return self.runner.weight_bytes

    def _made(self, size: int) -> Bucket:
        none = np.zeros(0, np.int32)
        empty = Batch(none, none, none, none, np.zeros((0, self.width), np.int32))
        packed = self.runner.packed(padded(empty, size, self.runner.scratch))
        numbers = packed.sent(self.runner.device)
        fixed = numbers[: packed.num_fixed].clone()
        tables = numbers[packed.num_fixed :].view(size, self.width).clone()
        step = packed.step(fixed, tables)
        if self._logits is None:
            self._logits = torch.empty_like(self.runner.forward(step))
        target = self._logits[:size]
        return Bucket(fixed, tables, self.capture(lambda: target.copy_(self.runner.forward(step))))


def why_not(config: Mapping[str, Any]) -> str | None:
    """What keeps a step of a model from being captured: numbers that the host reads in its middle. None: nothing known."""
    if any(config.get(name) for name in _EXPERTS):
        return "experts are chosen on the host"
    if scaled := sorted(rope_types(config) & {"dynamic", "longrope"}):
        return f"rotary embedding {scaled[0]!r} looks at the longest position on the host"
    return None


def uncaptured(body: Body) -> Body:
    """Work that is done anew each time."""
    return body


class Graphs:
    """Captures CUDA graphs that share one pool of memory: at any time one of them runs."""

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, body: Body) -> Body:
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                body()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls may spoil the capture: NCCL has a thread that looks at its events all the time.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            logits = body()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
