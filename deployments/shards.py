"""A model's ranks as Ray actors of one placement group: started together, watched together, ended together.

The replica owns them, so they die with it; when one of them dies, the replica ends the rest. Serve itself never looks at them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import ModelNotServable, PlatformError, Unavailable
from cluster.private_files import private_directory
from deployments.engine.device import bundle
from deployments.engine.progress import Loaded, Progress
from deployments.engine.remote import RemoteEngine
from deployments.engine.rendezvous import Rendezvous
from deployments.engine.shard import ShardSpec


class ShardActor:
    """One rank in its own process."""

    def __init__(self, log_level: str) -> None:
        from cluster import log

        log.configure(log_level)
        self._progress = Progress()

    def where(self) -> tuple[str, str, int]:
        """Node id, address and pid."""
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), os.getpid()

    def free_port(self) -> int:
        import socket

        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def load(self, spec: ShardSpec) -> None:
        from deployments.engine.shard import Shard

        self._shard = Shard(spec, self._progress)

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

    def __init__(self, spec: ShardSpec, folder: Path, *, log_level: str) -> None:
        self.spec = spec
        self.size = spec.rendezvous.size
        self._folder = Path(tempfile.mkdtemp(dir=private_directory(folder)))  # the socket and the ranks' meeting file
        self.engine = RemoteEngine(self._folder / "rank0.sock", spec.settings.stream_interval_s)
        self._actors = [self._actor(rank, log_level) for rank in range(self.size)]
        self._watch: asyncio.Task[None] | None = None
        self.pids: list[int] = []

    async def start(self) -> None:
        """Load the model on every rank and connect to rank 0. On any failure nothing is left running.

        Raises ModelNotServable for what the model can't, Unavailable when it takes longer than `engine.start_deadline_s`.
        """
        try:
            async with asyncio.timeout(self.spec.settings.start_deadline_s):
                places = await asyncio.gather(*(actor.where.remote() for actor in self._actors))
                self.pids = [pid for _, _, pid in places]
                address = await self._meeting_address(places)
                specs = [self.spec.at(Rendezvous(address, rank, self.size, self._timeout_s)) for rank in range(self.size)]
                await asyncio.gather(*(actor.load.remote(spec) for actor, spec in zip(self._actors, specs, strict=True)))
                await self.engine.listen()
                runs = [actor.follow.remote() for actor in self._actors[1:]]
                runs.append(self._actors[0].lead.remote(str(self.engine.path)))
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

    def kill(self) -> None:
        """End every rank at once."""
        for actor in self._actors:
            with contextlib.suppress(ray.exceptions.RayError, ValueError):
                ray.kill(actor, no_restart=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _timeout_s(self) -> float:
        return self.spec.settings.start_deadline_s  # of one collective; a hang is noticed much earlier by the progress clock

    async def _end_together(self, runs: list[Any]) -> None:
        """Wait until the first rank ends, for whatever reason, then end them all."""
        done, _ = await asyncio.wait([asyncio.ensure_future(_outcome(run)) for run in runs], return_when=asyncio.FIRST_COMPLETED)
        self.engine.fail(next(iter(done)).result())
        self.kill()

    async def _meeting_address(self, places: list[tuple[str, str, int]]) -> str:
        """A file when all ranks share a node, so that no port is opened; else a port of rank 0's node."""
        if len({node for node, _, _ in places}) == 1:
            return f"file://{self._folder}/{self._folder.name}"
        return f"tcp://{places[0][1]}:{await self._actors[0].free_port.remote()}"

    def _actor(self, rank: int, log_level: str) -> Any:
        needs, threads = bundle(self.spec.settings), str(self.spec.threads)
        options = ray.remote(ShardActor).options(
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0),
            max_restarts=0,
            max_concurrency=2,  # `where` and `loading` answer while `load` or `follow` runs
            scheduling_strategy=PlacementGroupSchedulingStrategy(get_current_placement_group(), rank),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}},
        )
        return options.remote(log_level)


async def _outcome(run: Any) -> str:
    """Why a rank's run ended, in words for a client: no path, no address."""
    try:
        await run
    except ray.exceptions.RayActorError:
        return "a shard of the model's group died"
    except ray.exceptions.RayTaskError as error:
        return f"a shard of the model's group failed ({type(error.cause).__name__})"
    return "the shard group was stopped"
