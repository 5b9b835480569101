"""One computation that several callers follow, each from its start and at its own pace. It ends when the last of them has left."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Generic, TypeVar

from cluster.errors import PlatformError

Item = TypeVar("Item")


class Flight(Generic[Item]):
    """Iterates its source in a task of its own, so that the caller who began may leave before the others."""

    def __init__(self, source: AsyncGenerator[Item, None], on_end: Callable[[list[Item] | None], Awaitable[None]]) -> None:
        """`on_end` is called once, with all items, or None when the source failed or nobody was left."""
        self._items: list[Item] = []
        self._error: Exception | None = None
        self._has_ended = False
        self._followers = 0
        self._news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.ensure_future(self._fly(source, on_end))

    @property
    def is_open(self) -> bool:
        """Whether somebody may still join."""
        return self._error is None and not self._task.cancelling()

    async def follow(self) -> AsyncGenerator[Item, None]:
        """Every item. Raises what the source raised. Must be closed; the last one to do so ends an unfinished flight."""
        self._followers += 1
        try:
            seen = 0
            while True:
                while seen < len(self._items):
                    seen += 1
                    yield self._items[seen - 1]
                if self._has_ended:
                    break
                await asyncio.shield(self._news)
            if self._error is not None:  # each gets its own: a traceback grows with every raise
                raise copy.copy(self._error) if isinstance(self._error, PlatformError) else self._error
        finally:
            self._followers -= 1
            if not self._followers and not self._has_ended:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)

    async def _fly(self, source: AsyncGenerator[Item, None], on_end: Callable[[list[Item] | None], Awaitable[None]]) -> None:
        whole: list[Item] | None = None
        try:
            async with aclosing(source):
                async for item in source:
                    self._items.append(item)
                    self._tell()
            whole = self._items
        except Exception as error:
            self._error = error
        finally:
            self._has_ended = True
            self._tell()
            await on_end(whole)

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.get_running_loop().create_future()
        news.set_result(None)
