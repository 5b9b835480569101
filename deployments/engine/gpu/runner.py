"""A rank's model on a device: `Runner` with its inputs sent in one copy, attention by a kernel, and cached pages planned by memory.

The device may be a CPU: then `attend` is whatever the caller brings, and everything but speed is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from deployments.engine.attention import AttentionCall, KvCache, Paged
from deployments.engine.batch import Batch
from deployments.engine.gpu.inputs import Packed, Step, pack
from deployments.engine.runner import Runner

Attend = Callable[[Tensor, Tensor, Tensor, AttentionCall, Step], Tensor]
CPU_PROCESSORS = 1


class DeviceRunner(Runner):
    """One block more than the cache's own is for rows that only fill a batch up: `scratch`."""

    def __init__(
        self, model: nn.Module, cache: KvCache, device: torch.device, attend: Attend, *, group: int, kv_heads: int
    ) -> None:
        """`group` query heads share a key/value head, of which this rank has `kv_heads`: how work is dealt out."""
        super().__init__(model, KvCache(cache.num_blocks + 1, cache.block_size), device=device)
        self.attend, self.group, self.kv_heads = attend, group, kv_heads
        self.processors = processors(device)

    @property
    def scratch(self) -> int:
        return self.cache.num_blocks - 1

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """`R x V` logits on the device. A step that gives none is waited for, so that its time is its own."""
        packed = self.packed(batch)
        numbers = packed.sent(self.device)
        tables = numbers[packed.num_fixed :].view(-1, packed.width)
        logits = self.forward(packed.step(numbers[: packed.num_fixed], tables))
        if not len(batch.sampled):
            synchronise(self.device)
        return logits

    def packed(self, batch: Batch) -> Packed:
        return pack(batch, self.cache.block_size, self.group, self.processors, self.kv_heads)

    def forward(self, step: Step) -> Tensor:
        """Everything that happens on the device; a graph holds no more and no less."""

        def kernel(queries: Tensor, keys: Tensor, values: Tensor, call: AttentionCall) -> Tensor:
            return self.attend(queries, keys, values, call, step)

        output = self.model(
            input_ids=step.tokens[None].long(),
            position_ids=step.positions[None].long(),
            use_cache=False,
            logits_to_keep=step.rows.long(),
            paged=Paged(self.cache, step.slots.long(), [], [], kernel),
        )
        return output.logits[0]  # type: ignore[no-any-return]

    def error(self) -> float:
        """Of the logits that the kernel leads to, against those of the readable attention, relative to the largest."""
        vocabulary = self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        found = list(_probes(vocabulary, self.cache.block_size))
        expected = [super(DeviceRunner, self).run(probe).float() for probe in found]
        return max(_difference(self.run(probe).float(), logits) for probe, logits in zip(found, expected, strict=True))

    def resize(self, num_blocks: int) -> None:
        """Of so many blocks, and the scratch one."""
        self.cache.resize(num_blocks + 1)


def processors(device: torch.device) -> int:
    """Programs that a device works on at once."""
    if device.type != "cuda":
        return CPU_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _probes(vocabulary: int, size: int) -> Iterator[Batch]:
    """Two sequences: both prompts at once, a token of each, then a token of one beside a chunk of the other."""
    short, long, last = 5, size + 5, size + 3
    width = -(-(long + 1 + last) // size)
    used = -(-(short + 2) // size)
    tables = np.zeros((2, width), np.int32)
    tables[0, :used] = np.arange(width, width + used)
    tables[1] = np.arange(width)[::-1]
    for starts, counts in (([0, 0], [short, long]), ([short, long], [1, 1]), ([short + 1, long + 1], [1, last])):
        rows = enumerate(zip(starts, counts, strict=True))
        tokens = [np.arange(start, start + count) * (7 + row) + 1 for row, (start, count) in rows]
        numbers = (np.concatenate(tokens) % vocabulary).astype(np.int32)
        yield Batch(numbers, np.array(starts, np.int32), np.array(counts, np.int32), np.arange(2, dtype=np.int32), tables)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest, relative to the largest logit; NaN when a logit is."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
