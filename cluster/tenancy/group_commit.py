"""Operations of many coroutines in one transaction: whoever comes while one is written goes together with the next.

No timer and no thread of its own: a lone caller pays one transaction, and a hundred at once pay it together. Operations are written
in the order in which they came.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from cluster.errors import LedgerUnavailable, PlatformError
from cluster.tenancy.books import Operation, Settled
from cluster.tenancy.ledger import Result

logger = logging.getLogger(__name__)

MOST = 64
"""Operations of one transaction."""

AGAIN_S = (1.0, 30.0)
"""After how long is tried again what must be written: at first, and at most."""

Done = asyncio.Future[Settled | None]


class GroupCommit:
    """In front of `Ledger.apply`, for one event loop. `close` waits for what was begun."""

    def __init__(self, apply: Callable[[Sequence[Operation]], list[Result]], again_s: tuple[float, float] = AGAIN_S) -> None:
        self._apply = apply
        self._again_s = again_s
        self._waiting: list[tuple[Operation, Done]] = []
        self._work: asyncio.Task[None] | None = None
        self._persisting = set[asyncio.Task[None]]()
        self._thread = ThreadPoolExecutor(1, "ledger")

    async def do(self, operation: Operation) -> Settled | None:
        """Returns when it is durable. Raises what the ledger refuses it with.

        Cancelling the caller does not undo it: who reserves must settle, even if it never saw the reservation succeed.
        """
        return await self._put(operation)

    def persist(self, operation: Operation) -> Done:
        """Of the first try, as `do` tells it. While the ledger can't be written it is tried again, whoever still waits for it:
        nobody else would ever settle what a living process has reserved."""
        tried: Done = asyncio.get_running_loop().create_future()
        tried.add_done_callback(_seen)
        work = asyncio.ensure_future(self._persist(operation, self._put(operation), tried))
        self._persisting.add(work)
        work.add_done_callback(self._persisting.discard)
        return tried

    async def close(self) -> None:
        if self._work is not None:
            await asyncio.wait({self._work})
            await asyncio.sleep(0)  # for those who hear of it now
        for work in self._persisting:
            work.cancel()
        await asyncio.gather(*self._persisting, return_exceptions=True)
        self._thread.shutdown()

    def _put(self, operation: Operation) -> Done:
        done: Done = asyncio.get_running_loop().create_future()
        self._waiting.append((operation, done))
        if self._work is None or self._work.done():
            self._work = asyncio.ensure_future(self._run())
        return done

    async def _persist(self, operation: Operation, done: Done, tried: Done) -> None:
        pause_s, most_s = self._again_s
        while True:
            try:
                _tell(tried, await done)
                return
            except LedgerUnavailable as error:
                logger.critical("the ledger will be told again", extra={"request_id": operation.request_id})
                _tell(tried, error)
            except PlatformError as error:
                _tell(tried, error)
                return
            await asyncio.sleep(pause_s)
            pause_s, done = min(2 * pause_s, most_s), self._put(operation)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            group, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
            try:
                results = await loop.run_in_executor(self._thread, self._apply, [operation for operation, _ in group])
            except Exception as error:
                results = [error if isinstance(error, PlatformError) else PlatformError(str(error))] * len(group)
            for (_, done), result in zip(group, results, strict=True):
                _tell(done, result)


def _tell(done: Done, result: Result) -> None:
    if done.done():  # its caller has left
        return
    if isinstance(result, PlatformError):
        done.set_exception(result)
    else:
        done.set_result(result)


def _seen(done: Done) -> None:
    """Whoever waited may have left before a refusal came: that is no news for the log."""
    if not done.cancelled():
        done.exception()
