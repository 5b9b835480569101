"""The life of a replica's shard group: watched, replaced when it is lost or stuck, put to sleep, woken, given other weights.

While a group can't compute, callers wait in the engine's bounded queue; what ran when it was lost ends with an error. One change at
a time. Runs on the replica's event loop, knows no request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Literal

from cluster.errors import Conflict, PlatformError, Unavailable
from cluster.settings import EngineSettings
from deployments.engine.orders import Sleep, Swap, Wake
from deployments.engine.remote import RemoteEngine
from deployments.engine.stepclock import Watch
from deployments.shards import ShardGroup

log = logging.getLogger(__name__)

State = Literal["loading", "awake", "asleep", "lost"]

LOOK_S = 1.0
SUSPECT_S = 2.5
"""Silence after which the ranks are asked what they do. A healthy group reports every second."""
ANSWER_S = 1.5
BRIEF_S, MOST_BRIEF = 30.0, 3
"""When so many groups in a row live no longer, the replica leaves: Serve starts another, and waits longer each time."""


class Life:
    """Of one group after the other. `make` makes one for a model directory; `leave` ends this process: Serve starts another."""

    def __init__(
        self, make: Callable[[Path], ShardGroup], directory: Path, settings: EngineSettings, leave: Callable[[], None]
    ) -> None:
        self._make, self._leave, self._settings = make, leave, settings
        self.directory = directory
        self.state: State = "loading"
        self.num_lost = self.num_stuck = 0  # groups; the stuck ones are among the lost ones
        self.group = make(directory)
        self._watch = Watch(self.group.size)
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready_at = self._used_at = time.monotonic()
        self._num_brief = 0

    @property
    def is_asleep(self) -> bool:
        return self.state == "asleep"

    @property
    def engine(self) -> RemoteEngine:
        return self.group.engine

    async def start(self) -> None:
        """Load, and watch from then on. Raises what `ShardGroup.start` does."""
        await self.group.start()
        self._is_ready()
        self._spawn(self._keep_looking())

    def wanted(self) -> None:
        """Somebody is about to wait for an answer."""
        self._used_at = time.monotonic()
        if self.state == "asleep":
            self._spawn(self.wake())

    async def sleep(self) -> None:
        """Give the memory of weights and KV cache back. Running answers have `engine.drain_s` to end; the others go on, without
        losing a token, once it is awake again. Raises Conflict when requests came meanwhile, Unavailable when a rank could not."""
        async with self._changing:
            await self._sleep()

    async def wake(self) -> None:
        """Load again. Raises Unavailable when that fails; then the group is replaced."""
        async with self._changing:
            await self._wake()

    async def swap(self, directory: Path) -> None:
        """Go on with another directory's weights. Every answer comes from one version: running ones end first, later ones wait.

        Raises Conflict when they don't end within `engine.drain_s` or the model has another shape, ModelNotServable for weights
        that nobody could serve, Unavailable when the ranks can't take them; the old ones serve on then.
        """
        async with self._changing:
            await self._wake()
            engine = self.engine
            engine.hold()
            try:
                if not await self._drained(engine):
                    raise Conflict(f"answers still run after engine.drain_s={self._settings.drain_s:g} s")
                began = time.monotonic()
                await engine.order(Swap(str(directory)))
                self.directory = directory
                log.info("weights swapped", extra={"seconds": round(time.monotonic() - began, 3)})
            finally:
                engine.release()

    async def _sleep(self) -> None:
        if self.is_asleep:
            return
        engine = self.engine
        engine.hold()
        try:
            drained = await self._drained(engine)
            if engine.num_held:
                raise Conflict("requests came while it was about to sleep", retry_after_s=1)
            await engine.order(Sleep())
        except BaseException:
            engine.release()
            raise
        self.state = "asleep"
        log.info("asleep", extra={"unfinished": not drained})
        if self.engine.num_held:  # since then
            self._spawn(self.wake())

    async def _wake(self) -> None:
        if self.state != "asleep":
            return
        engine, began = self.engine, time.monotonic()
        try:
            await engine.order(Wake())
        except PlatformError as error:
            engine.fail(f"the model could not wake: {error.message}")
            self.group.kill()
            raise
        self._is_ready()
        engine.release()
        log.info("awake", extra={"seconds": round(time.monotonic() - began, 3)})

    async def _drained(self, engine: RemoteEngine) -> bool:
        try:
            async with asyncio.timeout(self._settings.drain_s):
                await engine.drain()
        except TimeoutError:
            return False
        return True

    def _is_ready(self) -> None:
        self.state = "awake"
        self._ready_at = self._used_at = time.monotonic()

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self._look()
            except Conflict as error:
                log.info("not asleep", extra={"reason": error.message})
            except Exception:
                log.exception("the shard group can't be kept alive")
                self.state = "lost"
                self._leave()
                return

    async def _look(self) -> None:
        await self._look_at_ranks()
        if self.engine.lost:
            async with self._changing:
                await self._replace()
        elif self._settings.sleep_after_s and self.state == "awake" and self._idle_s > self._settings.sleep_after_s:
            await self.sleep()

    @property
    def _idle_s(self) -> float:
        if self.engine.num_streams:
            self._used_at = time.monotonic()
        return time.monotonic() - self._used_at

    async def _look_at_ranks(self) -> None:
        """Rank 0 reports only what all ranks have done, so its words are enough as long as they come."""
        engine, deadline = self.engine, self._settings.step_deadline_s
        if engine.lost or engine.silence_s < min(SUSPECT_S, deadline / 2):
            self._watch.forget()
            return
        if engine.is_obeying:
            deadline = self._settings.start_deadline_s
        self._watch.saw(await self.group.doing(ANSWER_S), min(engine.silence_s, deadline / 2))
        if (why := self._watch.stuck(deadline)) and not engine.lost:
            self.num_stuck += 1
            log.error("the shard group is stuck", extra={"reason": why})
            engine.fail(f"the shard group is stuck: {why}")
            self.group.kill()

    async def _replace(self) -> None:
        """Raises Unavailable when the group was lost too soon, or what its start raises."""
        was_asleep, self.state = self.state == "asleep", "loading"
        self.num_lost += 1
        reason = self.engine.lost
        self.engine.close()
        self.group.kill()
        began = time.monotonic()
        self._num_brief = self._num_brief + 1 if began - self._ready_at < BRIEF_S else 0
        if self._num_brief == MOST_BRIEF:
            raise Unavailable(f"{MOST_BRIEF} groups lived less than {BRIEF_S:g} s; the last: {reason}")
        self.group = self._make(self.directory)
        self.engine.hold()
        self._watch.forget()
        try:
            await self.group.start()
        except BaseException as error:
            self.engine.fail(f"the shard group could not be replaced: {type(error).__name__}")
            raise
        self._is_ready()
        self.engine.release()
        log.warning("shard group replaced", extra={"reason": reason, "seconds": round(time.monotonic() - began, 3)})
        if was_asleep:
            await self._sleep()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(_quietly(work))
        self._tasks.add(task)  # asyncio itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)


async def _quietly(work: Coroutine[Any, Any, None]) -> None:
    """What goes wrong in the background is told by the streams that wait for it."""
    try:
        await work
    except PlatformError as error:
        log.error("the life of a group was disturbed", extra={"reason": error.message})
