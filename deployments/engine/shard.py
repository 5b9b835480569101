"""One rank as a process sees it: join the group, load its part of the model, then lead or follow until told to stop.

The same code runs in a Ray actor (`deployments/llm.py`), in a plain child process and in the caller's own (`local.py`).
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import ModelNotServable, PlatformError
from cluster.settings import EngineSettings
from deployments.engine.batch import Batch
from deployments.engine.checkpoint import ModelInfo
from deployments.engine.device import choose, visible_gpus
from deployments.engine.orders import Look, Order
from deployments.engine.progress import Progress
from deployments.engine.rendezvous import Rendezvous

if TYPE_CHECKING:
    from torch import Tensor

    from deployments.engine.fastgen import FastGen
    from deployments.engine.gpu.static import StaticDecode
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


class Shard:
    """A loaded rank."""

    def __init__(self, spec: ShardSpec, progress: Progress | None = None) -> None:
        os.environ["OMP_NUM_THREADS"] = str(spec.threads)
        import torch

        torch.set_num_threads(spec.threads)
        self.spec = spec
        self.device = torch.device(choose(spec.settings.device, spec.gpu, visible_gpus))
        self.progress = progress or Progress()
        self.group = self._join()
        self.runner = self._runner()

    def _join(self) -> Group | None:
        if self.spec.rendezvous.size == 1:
            return None
        from deployments.engine.group import Group

        settings = self.spec.settings
        native = settings.cache if settings.shared_memory else None
        return Group(self.spec.rendezvous, native=native, device=str(self.device))

    def _runner(self) -> Runner | Decoder | StaticDecode | FastGen:
        """On a GPU through our kernel or FastGen; else through the compiled decoder where that can be, else through torch."""
        if self.spec.settings.runner == "fastgen":
            return self._fastgen()
        if self.device.type == "cuda":
            return self._on_gpu()
        if self.spec.settings.runner == "torch":
            return self._checked()
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

    def _fastgen(self) -> FastGen:
        from deployments.engine.fastgen import FastGen

        runner = FastGen.load(self.spec, self.device)
        self.spec = runner.spec
        return runner

    def _on_gpu(self) -> Runner | StaticDecode:
        import torch

        from deployments.engine.gpu.build import gpu_runner
        from deployments.engine.load import load

        spec = self.spec
        torch.cuda.set_device(self.device)  # kernels are launched on the current one
        model = load(spec.directory, spec.model.dtype, self.group, spec.settings, self.progress, self.device)
        runner, num_blocks = gpu_runner(model, spec, self.device, self.group)
        self.spec = replace(spec, num_blocks=num_blocks)
        return runner

    def _ranks(self) -> Ranks:
        from deployments.engine.native.proof import Ranks

        group = self.group
        return Ranks(group.rank, group.all_agree, group.meeting or group.all_reduce) if group else Ranks()

    def _checked(self) -> Runner:
        """The model in transformers' own code, cut to this rank's part, with paging proven."""
        from deployments.engine.attention import KvCache
        from deployments.engine.load import load
        from deployments.engine.runner import Runner

        spec = self.spec
        model = load(spec.directory, spec.model.dtype, self.group, spec.settings, self.progress)
        runner = Runner(model, KvCache(spec.num_blocks, spec.settings.block_size))
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
        while (received := self.group.receive()) is not None:
            if isinstance(received, Order):
                self._together(received)
            else:
                self.runner.run(Batch.unpack(received))
        self.runner.close()

    def command(self, order: Order) -> None:
        """Leader: have every rank obey, between two steps. Raises PlatformError when a rank could not; the group goes on."""
        if self.group:
            self.group.order(order)
        if error := self._together(order):
            raise error

    def _together(self, order: Order) -> PlatformError | None:
        """Obey, and hear how the others fared."""
        failure = None
        try:
            self._obey(order)
        except PlatformError as error:
            failure = error
        if self.group and not self.group.all_agree(failure is None):
            return failure or PlatformError(f"another rank could not obey {type(order).__name__}")
        return failure

    def _obey(self, order: Order) -> None:
        """Raises PlatformError for what this rank can't do; it is then as it was before."""
        match order:
            case Look():
                pass

    def ping(self) -> None:
        if self.group:
            self.group.ping()

    def stop(self) -> None:
        if self.group:
            self.group.stop()
        self.runner.close()
