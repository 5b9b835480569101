"""An engine in another process, as the replica's event loop sees it: requests in, lists of outputs out, and a clock of progress."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import Conflict, ModelNotServable, Overloaded, PlatformError, ReplicaLost, Unavailable
from cluster.types import Priority
from deployments.engine.channel import Abort, Add, Beat, Command, Do, Done, Tokens, frame, read_report
from deployments.engine.messages import Output, Request, Stats
from deployments.engine.orders import ORDERS
from deployments.engine.pace import Gathered, slot_s


@dataclass(slots=True)
class _Stream:
    request: Request
    unfinished: set[int]  # choices
    gathered: Gathered[Output] = field(default_factory=Gathered)
    due: asyncio.Event = field(default_factory=asyncio.Event)
    is_heard: bool = False  # a token has come
    refused: PlatformError | None = None


class RemoteEngine:
    """Listens at `path` for rank 0. Everything runs on one event loop. `interval_s`: see `pace.py`."""

    def __init__(self, path: Path, interval_s: float = 0.0) -> None:
        self.path = path
        self._interval_s = interval_s
        self._timer: asyncio.TimerHandle | None = None
        self.stats = Stats()
        self.lost: str | None = None  # why, once the group is gone
        self._ids = itertools.count(1)
        self._streams: dict[int, _Stream] = {}
        self._orders: dict[int, asyncio.Future[None]] = {}
        self._held: list[Request] | None = None  # what rank 0 hasn't got; None: it gets everything at once
        self._left = asyncio.Event()
        self._connected = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._progress_at = time.monotonic()

    async def listen(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        self.path.chmod(0o600)

    async def connected(self) -> None:
        """Wait for rank 0's first word."""
        await self._connected.wait()

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    @property
    def num_held(self) -> int:
        """Of the streams, those that wait for `release`."""
        return sum(request.id in self._streams for request in self._held or ())

    @property
    def is_obeying(self) -> bool:
        """Whether an order is under way, which may take as long as a load."""
        return bool(self._orders)

    @property
    def silence_s(self) -> float:
        """Seconds since every rank last proved that it advances."""
        return time.monotonic() - self._progress_at

    def next_id(self) -> int:
        return next(self._ids)

    async def generate(self, request: Request) -> AsyncGenerator[list[Output], None]:
        """The request's outputs: the first and the last at once, between them all that a slot has gathered. What comes while the
        caller is busy comes as one list afterwards. Leaving early aborts what is unfinished.

        Raises ReplicaLost when the group dies, Overloaded when it had to make place before its first token.
        """
        self._raise_lost()
        stream = self._streams[request.id] = _Stream(request, set(range(request.sampling.n)))
        if self._held is None:
            self._send(Add(request))
        else:
            self._held.append(request)
        try:
            while stream.unfinished:
                outputs = [output for output in await self._next(stream) if output.index in stream.unfinished]
                stream.unfinished -= {output.index for output in outputs if output.finish_reason}
                yield outputs
        finally:
            self._streams.pop(request.id, None)
            self._left.set()
            if stream.unfinished:
                self._send(Abort(request.id))

    def hold(self) -> None:
        """From now on rank 0 gets no new request: they wait in their streams, in the same bounded queue."""
        if self._held is None:
            self._held = []

    def release(self) -> None:
        """Rank 0 gets those that wait."""
        held, self._held = self._held or [], None
        for request in held:
            if request.id in self._streams:
                self._send(Add(request))

    async def drain(self) -> None:
        """After `hold`: wait until rank 0 works on nothing. Raises ReplicaLost when the group dies."""
        while len(self._streams) > self.num_held:
            self._raise_lost()
            self._left.clear()
            await self._left.wait()
        self._raise_lost()

    def abort(self, request_id: int, index: int) -> None:
        """Stop one choice, whose text has met a stop string. No more outputs of it come."""
        self._streams[request_id].unfinished.discard(index)
        self._send(Abort(request_id, index))

    async def order(self, order: ORDERS) -> None:
        """Have every rank obey between two steps. Raises Conflict, ModelNotServable or Unavailable when one could not, ReplicaLost
        when the group dies."""
        self._raise_lost()
        number = self.next_id()
        done = self._orders[number] = asyncio.get_running_loop().create_future()
        self._send(Do(number, order))
        try:
            await done
        finally:
            del self._orders[number]

    def make_place(self, tenant: bytes, priority: Priority) -> bool:
        """Refuse a request that has no token yet in favour of a newcomer, so that nobody can fill the queue against others; False
        when nobody has to go. `batch` goes before `interactive`, then the newest of the tenant that has most."""
        held = Counter(stream.request.tenant for stream in self._streams.values())
        silent = [
            stream for stream in self._streams.values() if not stream.is_heard and stream.request.priority in ("batch", priority)
        ]
        behind = [stream for stream in silent if stream.request.priority != priority]
        greedy = [stream for stream in silent if held[stream.request.tenant] > held[tenant] + 1]
        if not (behind or greedy):
            return False
        victim = max(behind or greedy, key=lambda stream: (held[stream.request.tenant], stream.request.id))
        del self._streams[victim.request.id]
        victim.refused = Overloaded("the queue is full, and others have less in it", retry_after_s=1)
        victim.due.set()
        return True

    def fail(self, reason: str) -> None:
        """The group is gone: every stream ends with an error, and no new one starts."""
        if self.lost is None:
            self.lost = reason
            self._left.set()
            for stream in self._streams.values():
                stream.due.set()
            for done in self._orders.values():
                if not done.done():
                    done.set_exception(ReplicaLost(reason, retry_after_s=5))

    def _raise_lost(self) -> None:
        if self.lost:
            raise ReplicaLost(self.lost, retry_after_s=5)

    def close(self) -> None:
        """Stop listening and hang up, which ends rank 0's loop."""
        self._server.close()
        if self._writer:
            self._writer.close()

    def _send(self, command: Command) -> None:
        if self._writer and not self.lost:
            self._writer.write(frame(command))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                report = await read_report(reader)
                self._progress_at = time.monotonic()
                match report:
                    case Tokens(outputs):
                        self._deliver(outputs)
                    case Beat(stats):
                        self.stats = stats
                        self._connected.set()
                    case Done(number, error, code):
                        self._obeyed(number, error, code)
        self.fail("rank 0 of the shard group ended")
        writer.close()

    def _obeyed(self, number: int, error: str | None, code: str) -> None:
        done = self._orders.get(number)
        if done is None or done.done():  # nobody waits for it any more
            return
        if error is None:
            done.set_result(None)
        else:
            kinds: dict[str, type[PlatformError]] = {kind.code: kind for kind in (Conflict, ModelNotServable)}
            done.set_exception(kinds.get(code, Unavailable)(error))

    def _deliver(self, outputs: list[Output]) -> None:
        by_request: dict[int, list[Output]] = {}
        for output in outputs:
            by_request.setdefault(output.request_id, []).append(output)
        now, slot = _now(), slot_s(self._interval_s, len(self._streams))
        for request_id, items in by_request.items():
            if stream := self._streams.get(request_id):  # aborted ones have no stream any more
                ends = any(output.finish_reason for output in items)
                stream.is_heard = True
                stream.gathered.add(items, now_s=now, slot_s=slot, urgent=ends)
        self._wake()

    def _wake(self) -> None:
        """Let the streams go on that are due, and come back when the next ones are."""
        now, next_s = _now(), math.inf
        for stream in self._streams.values():
            if stream.gathered.due_s <= now:
                stream.due.set()
            else:
                next_s = min(next_s, stream.gathered.due_s)
        if self._timer:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(next_s, self._wake) if next_s < math.inf else None

    async def _next(self, stream: _Stream) -> list[Output]:
        """What is gathered, once it is due; the rest of it when the group is gone, and then ReplicaLost."""
        await stream.due.wait()
        if stream.refused:
            raise stream.refused
        if not self.lost:
            stream.due.clear()
        elif not stream.gathered.items:
            raise ReplicaLost(self.lost, retry_after_s=5)
        return stream.gathered.take(_now())


def _now() -> float:
    return asyncio.get_running_loop().time()
