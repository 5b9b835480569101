"""What one rank is to be, and how many blocks its cache has. Knows settings and shapes, no tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cluster.errors import ModelNotServable
from cluster.settings import EngineSettings
from deployments.engine.checkpoint import ModelInfo
from deployments.engine.rendezvous import Rendezvous


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """What a rank is to be. `threads` is for this rank alone."""

    directory: Path
    model: ModelInfo
    num_blocks: int
    threads: int
    settings: EngineSettings
    rendezvous: Rendezvous
    gpu: int | None = None  # the rank's own, among those that its process sees
    exactly: bool = False  # `num_blocks` is wanted so, and not to be changed to what a GPU's memory holds

    def at(self, rendezvous: Rendezvous) -> ShardSpec:
        return replace(self, rendezvous=rendezvous)

    def for_rank(self, rank: int) -> ShardSpec:
        """One process of several on a machine whose GPUs they all see."""
        return replace(self.at(replace(self.rendezvous, rank=rank)), gpu=None if self.gpu is None else rank)


def num_blocks(model: ModelInfo, settings: EngineSettings) -> int:
    """Blocks that `kv_cache_bytes` holds, over all ranks. Raises ModelNotServable when it holds none."""
    block_bytes = model.kv_bytes_per_token * settings.block_size
    blocks = settings.kv_cache_bytes // block_bytes
    if blocks < 1:
        raise ModelNotServable(f"engine.kv_cache_bytes={settings.kv_cache_bytes} holds no block of {block_bytes} bytes; raise it")
    longest = -(-model.max_model_len // settings.block_size)
    return min(blocks, longest * settings.max_sequences)  # more could never be used at once
