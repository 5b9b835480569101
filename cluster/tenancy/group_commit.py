"""Operations of many coroutines in one transaction: whoever comes while one is written goes together with the next.

No timer and no thread of its own: a lone caller pays one transaction, and a hundred at once pay it together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from cluster.errors import PlatformError
from cluster.tenancy.books import Operation, Settled
from cluster.tenancy.ledger import Result

MOST = 64
"""Operations of one transaction."""


class GroupCommit:
    """In front of `Ledger.apply`, for one event loop. `close` waits for what was begun."""

    def __init__(self, apply: Callable[[Sequence[Operation]], list[Result]]) -> None:
        self._apply = apply
        self._waiting: list[tuple[Operation, asyncio.Future[Settled | None]]] = []
        self._work: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "ledger")

    async def do(self, operation: Operation) -> Settled | None:
        """Returns when it is durable. Raises what the ledger refuses it with.

        Cancelling the caller does not undo it: who reserves must settle, even if it never saw the reservation succeed.
        """
        done: asyncio.Future[Settled | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((operation, done))
        if self._work is None or self._work.done():
            self._work = asyncio.ensure_future(self._run())
        return await done

    async def close(self) -> None:
        if self._work is not None:
            await asyncio.wait({self._work})
        self._thread.shutdown()

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


def _tell(done: asyncio.Future[Settled | None], result: Result) -> None:
    if done.done():  # its caller has left
        return
    if isinstance(result, PlatformError):
        done.set_exception(result)
    else:
        done.set_result(result)
