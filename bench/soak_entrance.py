"""How the soak's requests come into its engine: as in a replica and at its rank 0, but in one process.

Who wants an adapter holds it before and until it has left, by the adapters' real owner, on an event loop that turns between two
steps; so every order is obeyed there, too. Who wants a form of an answer waits until it is compiled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import msgspec

from cluster.types import Adapter
from deployments.adapters import Adapters, Found
from deployments.engine.adapter_files import base_shapes, inspect
from deployments.engine.checkpoint import DTYPE_BYTES
from deployments.engine.compiling import Compiling
from deployments.engine.local import LocalEngine
from deployments.engine.messages import Request
from deployments.engine.orders import ORDERS
from deployments.slots import Slots

SLOTS = 4
PATIENCE_S = 0.001
REST_TURNS = 30_000
"""Turns of the event loop, a millisecond each at least, after which something that still waits waits for ever."""


class Entrance:
    def __init__(self, local: LocalEngine, adapters: Mapping[Adapter, Path]) -> None:
        assert local.engine.grammars
        self._local, self._engine = local, local.engine
        self._files, self._adapters = adapters, list(adapters)
        self._base = base_shapes(local.shard.spec.directory)
        self._slots = Slots(SLOTS, 1 << 30)
        self._owner = Adapters(self._find, self._order, self._slots)
        self._compiling = Compiling(local.engine.grammars)
        self._loop = asyncio.new_event_loop()
        self._stays: dict[int, asyncio.Task[None]] = {}  # of requests with an adapter
        self._ends: dict[int, asyncio.Event] = {}  # of those that hold theirs

    @property
    def num_loads(self) -> int:
        return self._owner.num_loads

    def add(self, request: Request, adapter: int | None) -> None:
        if adapter is None:
            self._compile(request)
        else:
            self._stays[request.id] = self._loop.create_task(self._stay(request, self._adapters[adapter]))

    def turn(self) -> None:
        """Between two steps: adapters go on, and who can be worked on now enters the engine."""
        self._loop.run_until_complete(asyncio.sleep(0 if self._engine.has_work else PATIENCE_S))
        for number, task in list(self._stays.items()):
            if task.done():
                del self._stays[number]
                if not task.cancelled():
                    task.result()
        for request in self._compiling.ready():
            self._engine.add(request)

    def abort(self, number: int, index: int | None) -> bool:
        """Whether it was in the engine by now."""
        if number in self._stays and number not in self._ends:
            self._stays[number].cancel()
            return False
        if self._compiling.forget(number):
            return False
        self._engine.abort(number, index)
        return True

    def ended(self, number: int) -> None:
        """Nothing of the request goes on."""
        if end := self._ends.get(number):
            end.set()

    def check_idle(self) -> None:
        """Wait for loads that nobody needs any more. Raises AssertionError when anything is held, or waits, after that."""
        for _ in range(REST_TURNS):
            self.turn()
            if not (waiting := asyncio.all_tasks(self._loop)):
                break
        assert not waiting, f"{len(waiting)} tasks wait for ever for an adapter"
        self._slots.check_integrity()
        places = self._slots.places
        still = [*self._stays, *self._ends]
        assert not still, f"{len(still)} requests that have ended hold adapters"
        assert not self._owner.num_waiting, f"{self._owner.num_waiting} requests that have ended wait for adapters"
        assert not any(place.holders for place in places), "adapters are held by nobody"
        assert all(place.is_loaded for place in places), "an adapter has a slot and isn't loaded"
        ranks = self._local.shard.adapters
        assert ranks._installed.keys() == {place.slot for place in places}, "the ranks have adapters in other slots"
        assert not ranks._reading, "adapters are being read for nobody"
        assert not len(self._compiling), f"{len(self._compiling)} requests wait to have their form compiled"

    async def _stay(self, request: Request, adapter: Adapter) -> None:
        async with self._owner.held(adapter) as use:
            end = self._ends[request.id] = asyncio.Event()
            try:
                self._compile(msgspec.structs.replace(request, adapter=use))
                await end.wait()
            finally:
                del self._ends[request.id]

    def _compile(self, request: Request) -> None:
        if not self._compiling.add(request):
            self._engine.add(request)

    async def _order(self, order: ORDERS) -> None:
        self._local.obey(order)

    def _find(self, adapter: Adapter) -> Found:
        directory = self._files[adapter]
        files = inspect(directory, self._base)
        return Found(directory, files.num_parameters * DTYPE_BYTES[self._local.info.dtype])

    def __enter__(self) -> Entrance:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        if left:
            self._loop.run_until_complete(asyncio.wait(left))
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
        self._compiling.close()
