"""One rank as a process sees it: join the group, load its part of the model, then lead or follow until told to stop.

The same code runs in a Ray actor (`deployments/llm.py`), in a plain child process and in the caller's own (`local.py`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import PlatformError
from deployments.engine.batch import Batch
from deployments.engine.device import choose, visible_gpus
from deployments.engine.held import Held
from deployments.engine.orders import AwaitAdapter, DropAdapter, InstallAdapter, Look, Order, ReadAdapter, Sleep, Swap, Wake
from deployments.engine.progress import Progress
from deployments.engine.runners import Runners, sampler
from deployments.engine.shard_spec import ShardSpec
from deployments.engine.stepclock import Doing, StepClock

if TYPE_CHECKING:
    from torch import Tensor

    from deployments.engine.adapters import Adapters
    from deployments.engine.group import Group
    from deployments.engine.handover import Handover
    from deployments.engine.runners import AnyRunner


class Shard:
    """A loaded rank."""

    def __init__(self, spec: ShardSpec, progress: Progress | None = None) -> None:
        os.environ["OMP_NUM_THREADS"] = str(spec.threads)
        import torch

        self.device = torch.device(choose(spec.settings.device, spec.gpu, visible_gpus))
        self.progress = progress or Progress()
        self.clock = StepClock()
        self.group = _joined(spec, str(self.device))
        self.handover = _handed(spec)
        self._launched = 0
        self._held = Held(spec, Runners(self.device, self.group, self.handover, self.progress))
        self.sampler = sampler(spec) if spec.rendezvous.rank == 0 else None
        self.clock.waits()

    @property
    def spec(self) -> ShardSpec:
        """As it was given, but for the blocks that fit and the files that it took since."""
        return self._held.spec

    @property
    def runner(self) -> AnyRunner:
        """Raises Unavailable while it sleeps."""
        return self._held.runner

    @property
    def is_asleep(self) -> bool:
        return self._held.running is None

    @property
    def adapters(self) -> Adapters:
        return self._held.adapters

    def doing(self) -> Doing:
        """Asked from another thread, whatever this one does."""
        group, running = self.group, self._held.running
        ticks = float(self.progress.now().bytes_read) + (running.ticks if running else 0)
        return Doing(self.spec.rendezvous.rank, self.clock.phase, self.clock.step, group.talk if group else 0, ticks)

    @property
    def depth(self) -> int:
        """Steps that may be under way at once: each stage works on another."""
        return self.spec.rendezvous.pp

    def launch(self, batch: Batch) -> None:
        """Leader: let the stages before this one begin with a step, which `execute` will finish; in the order of the launches."""
        if self.group and self.depth > 1:
            self.group.send(batch.pack())
            self._launched += 1

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
        self._held.close()

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
                self._held.sleep()
            case Wake():
                self._held.wake()
            case Swap(directory):
                self._held.swap(Path(directory))

    def ping(self) -> None:
        if self.group:
            self.group.ping()

    def stop(self) -> None:
        if self.group:
            self.group.stop()
        self._held.close()


def _joined(spec: ShardSpec, device: str) -> Group | None:
    if spec.rendezvous.size == 1:
        return None
    from deployments.engine.group import Group

    native = spec.settings.cache if spec.settings.shared_memory else None
    return Group(spec.rendezvous, native=native, device=device)


def _handed(spec: ShardSpec) -> Handover | None:
    if spec.rendezvous.pp == 1:
        return None
    from deployments.engine.handover import Handover

    return Handover(spec.rendezvous.place)
