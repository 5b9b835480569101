"""One rank as a process sees it: load the model, join the group, then lead or follow until told to stop.

The same code runs in a Ray actor (`deployments/llm.py`), in a plain child process and in the caller's own (`local.py`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import ModelNotServable
from cluster.settings import EngineSettings
from deployments.engine.batch import Batch
from deployments.engine.checkpoint import ModelInfo
from deployments.engine.rendezvous import Rendezvous

if TYPE_CHECKING:
    from torch import Tensor

    from deployments.engine.group import Group


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """What a rank is to be. `threads` is for this rank alone."""

    directory: Path
    model: ModelInfo
    num_blocks: int
    threads: int
    settings: EngineSettings
    rendezvous: Rendezvous

    def at(self, rendezvous: Rendezvous) -> ShardSpec:
        return replace(self, rendezvous=rendezvous)

    def for_rank(self, rank: int) -> ShardSpec:
        return self.at(replace(self.rendezvous, rank=rank))


def num_blocks(model: ModelInfo, settings: EngineSettings) -> int:
    """Blocks that `kv_cache_bytes` holds, over all ranks. Raises ModelNotServable when it holds none."""
    block_bytes = model.kv_bytes_per_token * settings.block_size
    blocks = settings.kv_cache_bytes // block_bytes
    if blocks < 1:
        raise ModelNotServable(f"engine.kv_cache_bytes={settings.kv_cache_bytes} holds no block of {block_bytes} bytes; raise it")
    longest = -(-model.max_model_len // settings.block_size)
    return min(blocks, longest * settings.max_sequences)  # more could never be used at once


class Shard:
    """A loaded rank."""

    def __init__(self, spec: ShardSpec) -> None:
        os.environ["OMP_NUM_THREADS"] = str(spec.threads)
        import torch

        from deployments.engine.attention import KvCache
        from deployments.engine.group import Group
        from deployments.engine.runner import DTYPES, Runner, load_model

        torch.set_num_threads(spec.threads)
        self.spec = spec
        self.group: Group | None = None
        model = load_model(spec.directory, spec.model.dtype)
        if spec.rendezvous.size > 1:
            self.group = Group(spec.rendezvous, native=spec.settings.cache if spec.settings.shared_memory else None)
            model = self.group.shard(model, DTYPES[spec.model.dtype])
        self.runner = Runner(model, KvCache(spec.num_blocks, spec.settings.block_size))
        self.runner.check()

    def execute(self, batch: Batch) -> Tensor:
        """Leader: run a step on every rank."""
        if self.group:
            self.group.send(batch.pack())
        return self.runner.run(batch)

    def follow(self) -> None:
        """Every other rank: run what the leader sends, until it stops or the group breaks."""
        assert self.group, "a single rank has nobody to follow"
        while (packed := self.group.receive()) is not None:
            self.runner.run(Batch.unpack(packed))

    def ping(self) -> None:
        if self.group:
            self.group.ping()

    def stop(self) -> None:
        if self.group:
            self.group.stop()
