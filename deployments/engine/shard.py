"""One rank as a process sees it: join the group, load its part of the model, then lead or follow until told to stop.

The same code runs in a Ray actor (`deployments/llm.py`), in a plain child process and in the caller's own (`local.py`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import ModelNotServable, PlatformError, Unavailable
from cluster.settings import EngineSettings
from deployments.engine import sameness
from deployments.engine.batch import Batch
from deployments.engine.checkpoint import ModelInfo
from deployments.engine.device import choose, visible_gpus
from deployments.engine.memory import available, give_back
from deployments.engine.orders import AwaitAdapter, DropAdapter, InstallAdapter, Look, Order, ReadAdapter, Sleep, Swap, Wake
from deployments.engine.progress import Progress
from deployments.engine.rendezvous import Rendezvous
from deployments.engine.stepclock import Doing, StepClock

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deployments.engine.adapters import Adapters
    from deployments.engine.cuts import Cut
    from deployments.engine.fastgen import FastGen
    from deployments.engine.gpu.static import StaticDecode
    from deployments.engine.group import Group
    from deployments.engine.handover import Handover
    from deployments.engine.native.decoder import Decoder
    from deployments.engine.native.proof import Ranks
    from deployments.engine.runner import Runner
    from deployments.engine.sampler import Choose

log = logging.getLogger(__name__)

SWAP_ROOM = 2.5
"""Times a model's weights that a machine must have free for a second set of all ranks: as loaded, as packed, and some to spare."""


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
        self.clock = StepClock()
        self.group = self._join()
        self.handover = self._handed()
        self._cuts: Mapping[str, Cut] | None = None
        self._launched = 0
        self._running: Runner | Decoder | StaticDecode | FastGen | None = self._runner()
        self.adapters = self._adapters()
        self.choose = self._choose() if spec.rendezvous.rank == 0 else None
        give_back()
        self.clock.waits()

    @property
    def runner(self) -> Runner | Decoder | StaticDecode | FastGen:
        """Raises Unavailable while it sleeps."""
        if self._running is None:
            raise Unavailable("the model is asleep", retry_after_s=5)
        return self._running

    @property
    def is_asleep(self) -> bool:
        return self._running is None

    def doing(self) -> Doing:
        """Asked from another thread, whatever this one does."""
        group, running = self.group, self._running
        ticks = float(self.progress.now().bytes_read) + (running.ticks if running else 0)
        return Doing(self.spec.rendezvous.rank, self.clock.phase, self.clock.step, group.talk if group else 0, ticks)

    def _join(self) -> Group | None:
        if self.spec.rendezvous.size == 1:
            return None
        from deployments.engine.group import Group

        settings = self.spec.settings
        native = settings.cache if settings.shared_memory else None
        return Group(self.spec.rendezvous, native=native, device=str(self.device))

    def _handed(self) -> Handover | None:
        if self.depth == 1:
            return None
        from deployments.engine.handover import Handover

        return Handover(self.spec.rendezvous.place)

    def _runner(self) -> Runner | Decoder | StaticDecode | FastGen:
        """On a GPU through our kernel or FastGen; else through the compiled decoder where that can be, else through torch."""
        if self.device.type == "cuda" and self.depth > 1:
            raise ModelNotServable("stages are computed by CPUs only so far; use pp=1, or engine.device=cpu", param="pp")
        if self.spec.settings.runner == "fastgen":
            return self._fastgen()
        if self.device.type == "cuda":
            return self._on_gpu()
        if self.spec.settings.runner == "torch":
            return _checked(self._loaded())
        from deployments.engine.native.build import NativeUnavailable
        from deployments.engine.native.proof import Disproved, decoder_of

        runner = self._loaded()
        if self.spec.settings.native is False:
            return _checked(runner)
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
            return _checked(self._loaded() if isinstance(error, Disproved) else runner)

    def _choose(self) -> Choose | None:
        """The compiled way from logits to tokens, where it can be had."""
        from deployments.engine.native.build import NativeUnavailable
        from deployments.engine.native.sampling import NativeSampler

        if self.spec.settings.native is False:
            return None
        try:
            return NativeSampler(self.spec.settings.cache, self.spec.threads)
        except NativeUnavailable as error:
            log.info("samples through torch", extra={"reason": str(error)})
            return None

    def _fastgen(self) -> FastGen:
        from deployments.engine.fastgen import FastGen

        runner = FastGen.load(self.spec, self.device)
        self.spec = runner.spec
        return runner

    def _on_gpu(self) -> Runner | StaticDecode:
        import torch

        from deployments.engine.gpu.build import gpu_runner

        torch.cuda.set_device(self.device)  # kernels are launched on the current one
        runner, num_blocks = gpu_runner(self._module(), self.spec, self.device, self.group)
        self.spec = replace(self.spec, num_blocks=num_blocks)
        return runner

    def _ranks(self) -> Ranks:
        from deployments.engine.native.proof import Ranks

        group = self.group
        if not group:
            return Ranks()
        return Ranks(group.place.part, group.all_agree, (group.meeting or group.all_reduce) if group.place.tp > 1 else None)

    def _loaded(self) -> Runner:
        """The model in transformers' own code, cut to this rank's part."""
        from deployments.engine.attention import KvCache
        from deployments.engine.runner import Runner

        all_reduce = self.group.all_reduce if self.group and self.group.place.tp > 1 else None
        return Runner(self._module(), KvCache(self.spec.num_blocks, self.spec.settings.block_size), self.handover, all_reduce)

    def _module(self) -> nn.Module:
        """With weights that are numbers, all of them."""
        from deployments.engine import finite
        from deployments.engine.load import cuts_of, load

        spec = self.spec
        model = load(
            spec.directory, spec.model.dtype, self.group, spec.settings, self.progress, spec.model.quantization, self.device
        )
        self._all(lambda: finite.require(model, spec.directory.name))
        self._cuts = cuts_of(model)
        return model

    @property
    def depth(self) -> int:
        """Steps that may be under way at once: each stage works on another."""
        return self.spec.rendezvous.pp

    def launch(self, batch: Batch) -> None:
        """Leader: let the stages before this one begin with a step, which `execute` will finish; in the order of the launches."""
        if self.group and self.depth > 1:
            self.group.send(batch.pack())
            self._launched += 1

    def _adapters(self) -> Adapters:
        from deployments.engine.adapters import Adapters
        from deployments.engine.runner import DTYPES

        return Adapters(self.runner, self.spec.directory, self._cuts, DTYPES[self.spec.model.dtype])

    def execute(self, batch: Batch) -> Tensor:
        """Leader: run a step on every rank."""
        runner = self.runner
        self.clock.computes()
        if self._launched:
            self._launched -= 1
        elif self.group:
            self.group.send(batch.pack())
        logits = runner.run(batch)
        self.clock.waits()
        return logits

    def follow(self) -> None:
        """Every other rank: run what the leader sends, until it stops or the group breaks."""
        assert self.group, "a single rank has nobody to follow"
        while (received := self.group.receive()) is not None:
            if isinstance(received, Order):
                self._together(received)
            else:
                self.clock.computes()
                self.runner.run(Batch.unpack(received))
                self.clock.waits()
        self._end()

    def command(self, order: Order) -> None:
        """Leader: have every rank obey, between two steps. Raises PlatformError when a rank could not; the group goes on."""
        assert not self._launched, "steps are under way: Engine.drain comes first"
        if self.group:
            self.group.order(order)
        if error := self._together(order):
            raise error

    def _together(self, order: Order) -> PlatformError | None:
        """Obey, and hear how the others fared."""
        failure = None
        self.clock.obeys()
        try:
            self._obey(order)
        except PlatformError as error:
            failure = error
        agreed = not self.group or self.group.all_agree(failure is None)
        self.clock.waits()
        return failure if agreed or failure else PlatformError(f"another rank could not obey {type(order).__name__}")

    def _obey(self, order: Order) -> None:
        """Raises PlatformError for what this rank can't do; it is then as it was before."""
        match order:
            case Look():
                pass
            case ReadAdapter(slot, directory):
                self.adapters.read(slot, Path(directory))
            case AwaitAdapter(slot):
                self.adapters.wait(slot)
            case InstallAdapter(slot):
                self.adapters.install(slot)
            case DropAdapter(slot):
                self.adapters.drop(slot)
            case Sleep():
                self._close()
                give_back()
            case Wake():
                self._wake()
                give_back()
            case Swap(directory):
                self._swap(Path(directory))

    def _wake(self) -> None:
        if self._running is None:
            self._running = self._runner()
            self.adapters.move(self._running, self._cuts)

    def _swap(self, directory: Path) -> None:
        """The new weights are loaded beside the old ones where memory allows on every rank, else in their place."""
        before = self.spec
        place = before.rendezvous.place
        self._all(lambda: sameness.require(before.directory, directory, before.model, place.tp, place.pp))
        beside = available() > SWAP_ROOM * before.model.weight_bytes
        if not (self.group.all_agree(beside) if self.group else beside):
            self._close()
            give_back()
        self.spec = replace(before, directory=directory)
        try:
            loaded = self._runner()
        except PlatformError:
            self.spec = before
            self._wake()
            raise
        self._close()
        self._running = loaded
        self.adapters.move(loaded, self._cuts)
        give_back()

    def _all(self, check: Callable[[], None]) -> None:
        """Raises PlatformError on every rank when `check` does on any."""
        failure: PlatformError | None = None
        try:
            check()
        except PlatformError as error:
            failure = error
        if self.group and not self.group.all_agree(failure is None) and failure is None:
            failure = ModelNotServable(f"{self.spec.directory.name}: another rank refuses it")
        if failure:
            raise failure

    def _close(self) -> None:
        running, self._running = self._running, None
        self.adapters.rest()
        if running:
            running.close()

    def _end(self) -> None:
        self._close()
        self.adapters.close()

    def ping(self) -> None:
        if self.group:
            self.group.ping()

    def stop(self) -> None:
        if self.group:
            self.group.stop()
        self._end()


def _checked(runner: Runner) -> Runner:
    """With paging proven."""
    runner.check()
    return runner
