"""An engine in another process, as the replica's event loop sees it: requests in, lists of outputs out, and a clock of progress."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import Overloaded, PlatformError, ReplicaLost
from cluster.types import Priority
from deployments.engine.channel import Abort, Add, Beat, Command, Tokens, frame, read_report
from deployments.engine.engine import Output, Request, Stats


@dataclass(slots=True)
class _Stream:
    request: Request
    queue: asyncio.Queue[list[Output] | PlatformError]
    unfinished: set[int]  # choices
    is_heard: bool = False  # a token has come


class RemoteEngine:
    """Listens at `path` for rank 0. Everything runs on one event loop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stats = Stats()
        self.lost: str | None = None  # why, once the group is gone
        self._ids = itertools.count(1)
        self._streams: dict[int, _Stream] = {}
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
    def silence_s(self) -> float:
        """Seconds since every rank last proved that it advances."""
        return time.monotonic() - self._progress_at

    def next_id(self) -> int:
        return next(self._ids)

    async def generate(self, request: Request) -> AsyncIterator[list[Output]]:
        """The request's outputs as they come, all that have come at once. Leaving early aborts what is unfinished.

        Raises ReplicaLost when the group dies, Overloaded when it had to make place before its first token.
        """
        if self.lost:
            raise ReplicaLost(self.lost, retry_after_s=5)
        stream = self._streams[request.id] = _Stream(request, asyncio.Queue(), set(range(request.sampling.n)))
        self._send(Add(request))
        try:
            while stream.unfinished:
                outputs = [output for output in await _all(stream.queue) if output.index in stream.unfinished]
                stream.unfinished -= {output.index for output in outputs if output.finish_reason}
                yield outputs
        finally:
            self._streams.pop(request.id, None)
            if stream.unfinished:
                self._send(Abort(request.id))

    def abort(self, request_id: int, index: int) -> None:
        """Stop one choice, whose text has met a stop string. No more outputs of it come."""
        self._streams[request_id].unfinished.discard(index)
        self._send(Abort(request_id, index))

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
        victim.queue.put_nowait(Overloaded("the queue is full, and others have less in it", retry_after_s=1))
        return True

    def fail(self, reason: str) -> None:
        """The group is gone: every stream ends with an error, and no new one starts."""
        if self.lost is None:
            self.lost = reason
            for stream in self._streams.values():
                stream.queue.put_nowait(ReplicaLost(reason, retry_after_s=5))

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
        self.fail("rank 0 of the shard group ended")
        writer.close()

    def _deliver(self, outputs: list[Output]) -> None:
        by_request: dict[int, list[Output]] = {}
        for output in outputs:
            by_request.setdefault(output.request_id, []).append(output)
        for request_id, items in by_request.items():
            if stream := self._streams.get(request_id):  # aborted ones have no stream any more
                stream.is_heard = True
                stream.queue.put_nowait(items)


async def _all(queue: asyncio.Queue[list[Output] | PlatformError]) -> list[Output]:
    """Everything that has come, after waiting for something. Raises an error as soon as it is there."""
    outputs: list[Output] = []
    item = await queue.get()
    while True:
        if isinstance(item, PlatformError):
            raise item
        outputs += item
        if queue.empty():
            return outputs
        item = queue.get_nowait()
