"""One rank as a process sees it: load the model, join the group, then lead or follow until told to stop.

The same code runs in a Ray actor (`deployments/llm.py`), in a plain child process and in the caller's own (`local.py`).
"""

from __future__ import annotations

import logging
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
    from deployments.engine.native.decoder import Decoder
    from deployments.engine.native.proof import Ranks
    from deployments.engine.runner import Runner

log = logging.getLogger(__name__)


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


def uses_shared_memory(spec: ShardSpec) -> bool:
    """A rank that spins needs a core of its own, and one more for everybody else."""
    asked = spec.settings.shared_memory
    return asked if asked is not None else (os.cpu_count() or 1) > spec.rendezvous.size


class Shard:
    """A loaded rank."""

    def __init__(self, spec: ShardSpec) -> None:
        os.environ["OMP_NUM_THREADS"] = str(spec.threads)
        import torch

        torch.set_num_threads(spec.threads)
        self.spec = spec
        self.group = self._join()
        self.runner = self._runner()

    def _join(self) -> Group | None:
        if self.spec.rendezvous.size == 1:
            return None
        from deployments.engine.group import Group

        return Group(self.spec.rendezvous, shared_memory=uses_shared_memory(self.spec))

    def _runner(self) -> Runner | Decoder:
        """Through the compiled decoder where that can be, else through torch."""
        from deployments.engine.native.build import NativeUnavailable
        from deployments.engine.native.proof import Disproved, decoder_of

        runner = self._checked()
        if self.spec.settings.native is False:
            return runner
        try:
            return decoder_of(
                runner,
                num_blocks=self.spec.num_blocks,
                max_positions=self.spec.model.max_model_len,
                threads=self.spec.threads,
                cache=self.spec.settings.cache,
                ranks=self._ranks(),
            )
        except NativeUnavailable as error:
            if self.spec.settings.native:
                raise ModelNotServable(f"{self.spec.directory.name}: engine.native=true, but {error}") from error
            log.info("runs through torch", extra={"reason": str(error)})
            return self._checked() if isinstance(error, Disproved) else runner

    def _ranks(self) -> Ranks:
        from deployments.engine.native.proof import Ranks

        group = self.group
        return Ranks(group.rank, group.all_agree, group.all_reduce) if group else Ranks()

    def _checked(self) -> Runner:
        """The model in transformers' own code, cut to this rank's part, with paging proven."""
        from deployments.engine.attention import KvCache
        from deployments.engine.runner import DTYPES, Runner, load_model

        model = load_model(self.spec.directory, self.spec.model.dtype)
        if self.group:
            model = self.group.shard(model, DTYPES[self.spec.model.dtype])
        runner = Runner(model, KvCache(self.spec.num_blocks, self.spec.settings.block_size))
        runner.check()
        return runner

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
        self.runner.close()

    def ping(self) -> None:
        if self.group:
            self.group.ping()

    def stop(self) -> None:
        if self.group:
            self.group.stop()
        self.runner.close()
