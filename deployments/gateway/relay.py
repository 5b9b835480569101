"""Between models' streams and their reader: read ahead a little, notice silence, keep the deadline, close at once.

A `Relay` iterates each source in a task of its own, at most `AHEAD` items in front of the reader. What piles up while the reader
writes comes out as one batch, so a slow socket costs fewer writes instead of more memory. Closing it cancels the sources.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Generic, TypeVar

from cluster.errors import DeadlineExceeded

Item = TypeVar("Item")

AHEAD = 256
"""Items that wait for a slow reader before the sources wait too."""


class _End:
    """Follows the last item of a source; carries what stopped it early."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error


class Relay(Generic[Item]):
    """Ends when every source has ended or one has failed."""

    def __init__(self, sources: Sequence[AsyncGenerator[Item, None]], seconds: float) -> None:
        """`seconds`: longest life of the whole. Must be closed with `aclose`, whatever happens."""
        self._seconds = seconds
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._queue: asyncio.Queue[Item | _End] = asyncio.Queue(maxsize=AHEAD)
        self._open = len(sources)
        self._failed: Exception | None = None
        self._tasks = [asyncio.ensure_future(self._pump(source)) for source in sources]

    @property
    def has_ended(self) -> bool:
        """Whether all that the sources had to say was in the batches so far."""
        return not self._open and self._failed is None

    async def batches(self, silence_s: float) -> AsyncGenerator[list[Item], None]:
        """Everything that is ready, as it gets ready; an empty list after each `silence_s` without news.

        Raises what a source raised, after the items before it, and DeadlineExceeded.
        """
        while self._open and self._failed is None:
            batch, news = self._take(await self._next(silence_s))
            if batch or not news:
                yield batch
        if self._failed is not None:
            raise self._failed

    def _take(self, item: Item | _End | None) -> tuple[list[Item], bool]:
        """`item` and all that waits behind it, up to a failure; whether there was anything at all."""
        batch: list[Item] = []
        news = item is not None
        while item is not None and self._failed is None:
            if isinstance(item, _End):
                self._open -= 1
                self._failed = item.error
            else:
                batch.append(item)
            item = None if self._queue.empty() else self._queue.get_nowait()
        return batch, news

    async def _next(self, silence_s: float) -> Item | _End | None:
        remaining = self._deadline - asyncio.get_running_loop().time()
        if remaining > 0:
            try:
                async with asyncio.timeout(min(silence_s, remaining)):
                    return await self._queue.get()
            except TimeoutError:
                pass
        if remaining <= silence_s:
            raise DeadlineExceeded(f"The answer took longer than {self._seconds:g} s.")
        return None

    async def _pump(self, source: AsyncGenerator[Item, None]) -> None:
        end = _End()
        try:
            async with aclosing(source):
                async for item in source:
                    await self._queue.put(item)
        except Exception as error:
            end = _End(error)
        await self._queue.put(end)

    async def aclose(self) -> None:
        """Stop the sources now and wait until they have let go."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
