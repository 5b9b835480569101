"""A model's ranks as Ray actors of one placement group: started together, watched together, ended together.

The replica owns them, so they die with it; when one of them dies, the replica ends the rest. Serve itself never looks at them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.errors import ModelNotServable, PlatformError, Unavailable
from cluster.private_files import private_directory
from deployments.engine.device import bundle
from deployments.engine.progress import Loaded, Progress
from deployments.engine.remote import RemoteEngine
from deployments.engine.rendezvous import Rendezvous
from deployments.engine.shard_spec import ShardSpec
from deployments.engine.stepclock import Doing


@dataclass(frozen=True)
class Spot:
    """Where a rank is."""

    node: str  # its id
    host: str
    pid: int
    cpus: int  # of the node, whoever uses them


class ShardActor:
    """One rank in its own process."""

    def __init__(self, log_level: str) -> None:
        from cluster import log

        log.configure(log_level)
        self._progress = Progress()

    def where(self) -> Spot:
        return Spot(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), os.getpid(), os.cpu_count() or 1)

    def free_port(self, host: str) -> int:
        import socket

        with socket.socket() as probe:
            probe.bind((host, 0))
            return int(probe.getsockname()[1])

    def load(self, spec: ShardSpec) -> None:
        from deployments.engine.shard import Shard

        self._shard = Shard(spec, self._progress)

    def doing(self) -> Doing | None:
        """What it does at this moment; answers whatever that is. None before the load is done."""
        shard = getattr(self, "_shard", None)
        return shard.doing() if shard else None

    def loading(self) -> Loaded:
        """How far the load is; answers while `load` works."""
        return self._progress.now()

    def lead(self, path: str) -> None:
        from deployments.engine.lead import lead

        lead(self._shard, path)

    def follow(self) -> None:
        self._shard.follow()


class ShardGroup:
    """The actors of one replica, and the engine that their rank 0 runs."""

    def __init__(self, spec: ShardSpec, folder: Path, placement: Any, *, log_level: str) -> None:
        """`placement`: the placement group with a bundle for each rank."""
        self.spec = spec
        self._placement = placement
        self.size = spec.rendezvous.size
        self._folder = Path(tempfile.mkdtemp(dir=private_directory(folder)))  # the socket and the ranks' meeting file
        self.engine = RemoteEngine(self._folder / "rank0.sock", spec.settings.stream_interval_s)
        self._actors = [self._actor(rank, log_level) for rank in range(self.size)]
        self._watch: asyncio.Task[None] | None = None
        self.pids: list[int] = []
        self.nodes: list[str] = []  # of each rank

    async def start(self) -> None:
        """Load the model on every rank and connect to rank 0. On any failure nothing is left running.

        Raises ModelNotServable for what the model can't, Unavailable when it takes longer than `engine.start_deadline_s`.
        """
        try:
            async with asyncio.timeout(self.spec.settings.start_deadline_s):
                spots: list[Spot] = await asyncio.gather(*(actor.where.remote() for actor in self._actors))
                self.pids, self.nodes = [spot.pid for spot in spots], [spot.node for spot in spots]
                address = await self._meeting_address(spots)
                specs = [self._spec(address, rank, spots) for rank in range(self.size)]
                await asyncio.gather(*(actor.load.remote(spec) for actor, spec in zip(self._actors, specs, strict=True)))
                await self.engine.listen()
                runs = [actor.follow.remote() for actor in self._actors[1:]]
                runs.insert(0, self._actors[0].lead.remote(str(self.engine.path)))
                self._watch = asyncio.create_task(self._end_together(runs))
                await self.engine.connected()
        except TimeoutError:
            self.kill()
            deadline = self.spec.settings.start_deadline_s
            raise Unavailable(f"the shard group didn't load within engine.start_deadline_s={deadline:g} s") from None
        except ray.exceptions.RayTaskError as error:
            self.kill()
            raise error.cause if isinstance(error.cause, PlatformError) else ModelNotServable(str(error.cause)) from error
        except BaseException:
            self.kill()
            raise

    async def loading(self) -> list[Loaded]:
        """How far each rank's load is, in the order of the ranks."""
        return list(await asyncio.gather(*(actor.loading.remote() for actor in self._actors)))

    async def doing(self, wait_s: float) -> list[Doing | None]:
        """What each rank does; None for one that doesn't say so within `wait_s`."""
        return list(await asyncio.gather(*(_within(wait_s, actor.doing.remote()) for actor in self._actors)))

    def kill(self) -> None:
        """End every rank at once, a stopped one too: Ray asks a process to end itself, which that one can't."""
        for actor in self._actors:
            with contextlib.suppress(ray.exceptions.RayError, ValueError):
                ray.kill(actor, no_restart=True)
        for node, pid in zip(self.nodes, self.pids, strict=True):
            _end_process(node, pid)
        self.nodes, self.pids = [], []
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _timeout_s(self) -> float:
        return self.spec.settings.start_deadline_s  # of one collective; a hang is noticed much earlier by the progress clock

    async def _end_together(self, runs: list[Any]) -> None:
        """Wait until the first rank ends, for whatever reason, then end them all. `runs` by rank."""
        ends = [asyncio.ensure_future(_outcome(rank, run)) for rank, run in enumerate(runs)]
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        self.engine.fail(next(iter(done)).result())
        self.kill()

    async def _meeting_address(self, spots: list[Spot]) -> str:
        """A file when all ranks share a node, so that no port is opened; else a port of rank 0's node."""
        if len(set(self.nodes)) == 1:
            return f"file://{self._folder}/{self._folder.name}"
        host = spots[0].host
        return f"tcp://{host}:{await self._actors[0].free_port.remote(host)}"

    def _spec(self, address: str, rank: int, spots: list[Spot]) -> ShardSpec:
        """Of one rank. On several nodes, each has its share of its own node's cores."""
        spot, pp = spots[rank], self.spec.rendezvous.pp
        spec = self.spec.at(Rendezvous(address, rank, self.size, self._timeout_s, pp, spot.host))
        if spec.rendezvous.one_node or spec.settings.threads:
            return spec
        return replace(spec, threads=max(1, spot.cpus // self.nodes.count(spot.node)))

    def _actor(self, rank: int, log_level: str) -> Any:
        needs, threads, place = bundle(self.spec.settings), str(self.spec.threads), replace(self.spec.rendezvous, rank=rank).place
        number = rank // place.tp if place.pp > 1 else rank
        options = ray.remote(ShardActor).options(
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0),
            max_restarts=0,
            max_concurrency=2,  # `where` and `loading` answer while `load` or `follow` runs
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, number),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}},
        )
        return options.remote(log_level)


async def _outcome(rank: int, run: Any) -> str:
    """Why a rank's run ended, in words for a client: no path, no address."""
    try:
        await run
    except ray.exceptions.RayActorError:
        return f"a shard of the model's group died (rank {rank})"
    except ray.exceptions.RayTaskError as error:
        return f"a shard of the model's group failed (rank {rank}: {type(error.cause).__name__})"
    return f"the shard group was stopped (rank {rank} ended)"


async def _within(seconds: float, answer: Any) -> Any:
    try:
        async with asyncio.timeout(seconds):
            return await answer
    except (TimeoutError, ray.exceptions.RayError):
        return None


def _end_process(node: str, pid: int) -> None:
    """SIGKILL to a rank on this node, or by a task on its own."""
    if node == ray.get_runtime_context().get_node_id():
        _kill(pid)
        return
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    with contextlib.suppress(ray.exceptions.RayError):  # a node that is gone has no process
        ray.remote(_kill).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(pid)


def _kill(pid: int) -> None:
    """Only a rank: its number may be another process's by now."""
    with contextlib.suppress(OSError):
        if b"ShardActor" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
