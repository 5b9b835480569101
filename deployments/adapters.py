"""The adapters of one replica: the one owner of which are loaded, who uses them and what is being loaded.

A request holds its adapter from before it enters the engine until it has left it, so an adapter in use is never dropped. However
many ask for one at once, it is found and loaded once; when that fails, they are told, and nobody else. All on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from cluster.errors import InvalidRequest, ModelNotServable, PlatformError, ReplicaLost
from cluster.storage import Storage, name_of
from cluster.types import Adapter
from deployments.engine.adapter_files import base_shapes, inspect
from deployments.engine.checkpoint import DTYPE_BYTES
from deployments.engine.messages import AdapterUse
from deployments.engine.orders import ORDERS, AwaitAdapter, DropAdapter, InstallAdapter, ReadAdapter
from deployments.slots import Place, Slots

log = logging.getLogger(__name__)

FIRST_POLL_S, LONGEST_POLL_S = 0.005, 0.1
"""Between two questions whether all ranks have read an adapter. Each costs a message to every rank, between two steps."""


@dataclass(frozen=True, slots=True)
class Found:
    """Files that fit the base: where they are, and the bytes of their numbers once loaded, over all ranks."""

    directory: Path
    num_bytes: int


@dataclass(slots=True, eq=False)
class _Loading:
    """What those who hold a place wait for. It has failed until it has succeeded."""

    done: asyncio.Event = field(default_factory=asyncio.Event)
    failure: PlatformError | None = field(default_factory=lambda: PlatformError("the load of an adapter was cut off"))


class Adapters:
    """`find` says what an adapter's files are, checked as far as that goes without reading their numbers; it may block, so it runs
    beside the event loop. `order` has every rank obey."""

    def __init__(self, find: Callable[[Adapter], Found], order: Callable[[ORDERS], Awaitable[None]], slots: Slots) -> None:
        self._find, self._order, self.slots = find, order, slots
        self.num_waiting = 0
        self.num_loads = 0
        self._found: dict[str, asyncio.Task[Found]] = {}
        self._asking: dict[str, list[asyncio.Future[Place]]] = {}
        self._wanted: dict[str, tuple[Adapter, Found]] = {}  # of those that wait for a place
        self._loading: dict[Place, _Loading] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._dropping = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def held(self, adapter: Adapter | None) -> AsyncIterator[AdapterUse | None]:
        """The adapter, loaded on every rank, until the block is left. None: there is none to load.

        Raises ModelNotServable for files that aren't an adapter of this base, NotFound or StorageError for missing or damaged
        ones, ReplicaLost when the group dies.
        """
        if adapter is None:
            yield None
            return
        self.num_waiting += 1
        try:
            place = await self._placed(adapter)
        finally:
            self.num_waiting -= 1
        try:
            yield AdapterUse(place.slot, bytes.fromhex(adapter.address))
        finally:
            self._release(place)

    @property
    def num_loaded(self) -> int:
        return sum(place.is_loaded for place in self.slots.places)

    async def _placed(self, adapter: Adapter) -> Place:
        """A place that is held, with the adapter loaded in it."""
        found = await self._files(adapter)
        if not self.slots.count:
            raise InvalidRequest("This model is served without adapters (engine.max_adapters=0).", param="model")
        if not self.slots.fits(found.num_bytes):
            allowed = f"engine.adapter_bytes={self.slots.max_bytes}"
            raise ModelNotServable(f"the adapter {adapter.name!r} has {found.num_bytes} bytes, more than {allowed}", param="model")
        place = self.slots.ask(adapter.address, found.num_bytes) or await self._turn(adapter, found)
        try:
            if loading := self._loading.get(place):
                await loading.done.wait()
                if loading.failure:
                    raise loading.failure
        except BaseException:
            self._release(place)
            raise
        return place

    async def _files(self, adapter: Adapter) -> Found:
        """Found once for all who ask at the same time and later; a failure is forgotten, so that the next one tries again."""
        key = adapter.address
        if key not in self._found:
            self._found[key] = asyncio.create_task(asyncio.to_thread(self._find, adapter))
        task = self._found[key]
        try:
            return await asyncio.shield(task)
        except Exception:
            if self._found.get(key) is task:
                del self._found[key]
            raise

    async def _turn(self, adapter: Adapter, found: Found) -> Place:
        """Wait for a place, first come first served."""
        key, mine = adapter.address, asyncio.get_running_loop().create_future()
        self._asking.setdefault(key, []).append(mine)
        self._wanted[key] = adapter, found
        self._advance()
        try:
            place: Place = await mine
        except asyncio.CancelledError:
            self._leave_queue(key, mine)
            raise
        return place

    def _leave_queue(self, key: str, mine: asyncio.Future[Place]) -> None:
        if mine.done() and not mine.cancelled():  # it came at the same moment
            self._release(mine.result())
            return
        asking = self._asking.get(key, [])
        if mine in asking:
            asking.remove(mine)
        if key in self._asking and not asking:
            del self._asking[key], self._wanted[key]
            self.slots.forget(key)
            self._advance()

    def _release(self, place: Place) -> None:
        self.slots.release(place)
        self._advance()

    def _advance(self) -> None:
        """Give places to whom it is the turn of."""
        while grant := self.slots.grant():
            place, key = grant.place, grant.place.key
            for future in self._asking.pop(key):
                if not future.done():  # else its caller has left, and is about to notice
                    self.slots.hold(place)
                    future.set_result(place)
            adapter, found = self._wanted.pop(key)
            if grant.is_new:
                self._loading[place] = _Loading()
                task = asyncio.create_task(self._load(place, adapter, found, grant.evicted))
                self._tasks.add(task)  # asyncio itself holds tasks weakly
                task.add_done_callback(self._tasks.discard)

    async def _load(self, place: Place, adapter: Adapter, found: Found, evicted: tuple[int, ...]) -> None:
        loading = self._loading[place]
        try:
            async with self._dropping:  # before anybody loads into one of these
                for slot in evicted:
                    await self._order(DropAdapter(slot))
            await self._read(place.slot, found)
            self.slots.loaded(place)
            loading.failure = None
            self.num_loads += 1
            log.info("adapter loaded", extra={"adapter": adapter.name, "slot": place.slot, "evicted": list(evicted)})
        except PlatformError as error:
            log.warning("adapter not loaded", extra={"adapter": adapter.name, "reason": error.message})
            loading.failure = _failure(adapter, error)
            with contextlib.suppress(PlatformError):  # the group's end, which everybody hears of
                await self._order(DropAdapter(place.slot))
            self._found.pop(place.key, None)
            self.slots.failed(place)
        finally:
            del self._loading[place]
            loading.done.set()
            self._advance()

    async def _read(self, slot: int, found: Found) -> None:
        """Read beside the steps, install between two. Raises PlatformError when a rank can't."""
        await self._order(ReadAdapter(slot, str(found.directory)))
        pause = FIRST_POLL_S
        while not await self._is_read(slot):
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_S)
        await self._order(InstallAdapter(slot))

    async def _is_read(self, slot: int) -> bool:
        try:
            await self._order(AwaitAdapter(slot))
        except ReplicaLost:
            raise
        except PlatformError:
            return False
        return True


def finder(library: Path, base: Path, dtype: str) -> Callable[[Adapter], Found]:
    """Looks adapters up in the library below a folder, and checks them against the base's files."""

    @cache
    def shapes() -> dict[str, tuple[int, ...]]:
        return base_shapes(base)

    def find(adapter: Adapter) -> Found:
        directory = Storage(library).fetch(name_of(adapter.address))
        return Found(directory, inspect(directory, shapes()).num_parameters * DTYPE_BYTES[dtype])

    return find


def _failure(adapter: Adapter, error: PlatformError) -> PlatformError:
    if isinstance(error, ReplicaLost):
        return error
    return ModelNotServable(f"The adapter {adapter.name!r} can't be loaded: {error.message}", param="model")
