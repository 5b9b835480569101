"""Answers to what was asked before: exactly the same call, of the same tenant, to the same version of the model.

Stands between the gateway and the models and looks like them, so that streams and whole answers of every operation, over HTTP and
handles, share what it keeps. Only calls whose answer is determined are kept: encoders', those at temperature 0, those with a seed.
Equal calls that come while one is computed follow that one. What comes from here says so in its `Usage`, and costs what the ledger
says; `x-cache` tells the caller: `hit`, `shared` with one under way, `miss`, or `bypass`.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal, TypeVar

import msgspec

from cluster import metrics
from cluster.errors import PlatformError
from cluster.settings import GatewaySettings
from cluster.types import Chunk, Encode, Encoded, Generate, Predict, Predicted
from deployments.gateway.flight import Flight
from deployments.gateway.kept import Kept
from deployments.models import Answers, Models

Outcome = Literal["hit", "shared", "miss", "bypass"]
Item = TypeVar("Item", Chunk, Encoded)


_CHUNKS, _ENCODED = msgspec.msgpack.Decoder(list[Chunk]), msgspec.msgpack.Decoder(list[Encoded])


class Cache:
    """What the calls of one gateway share."""

    def __init__(self, models: Models, kept: Kept) -> None:
        self._models, self._kept = models, kept
        self._flights: dict[tuple[str, bytes], Flight[Any]] = {}

    @classmethod
    def of(cls, models: Models, settings: GatewaySettings) -> Cache | None:
        """None where the settings give it no memory."""
        if not settings.cache_bytes:
            return None
        return cls(models, Kept(settings.cache_bytes, settings.cache_tenant_bytes, settings.cache_s))

    def view(self, say: Callable[[Outcome], None]) -> Answers:
        """The models behind the cache, for one call; `say` hears how each part of it was answered, before its first item."""
        return _View(self, say)

    async def generate(self, name: str, request: Generate, say: Callable[[Outcome], None]) -> AsyncGenerator[Chunk, None]:
        version = await self._version(name) if is_repeatable(request) else None
        if version is None:
            say("bypass")
            async with aclosing(self._models.generate(name, request)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        answer = self._answer(name, version, request, lambda: self._models.generate(name, request), say)
        async with aclosing(answer) as chunks:
            async for chunk in chunks:
                yield chunk

    async def encode(self, name: str, request: Encode, say: Callable[[Outcome], None]) -> Encoded:
        version = await self._version(name)
        if version is None:
            say("bypass")
            return await self._models.encode(name, request)
        answer = self._answer(name, version, request, lambda: _alone(self._models, name, request), say)
        async with aclosing(answer) as answers:  # to its end, so that nobody seems to leave early
            found = [encoded async for encoded in answers]
        return found[0]

    async def predict(self, name: str, request: Predict) -> Predicted:
        """Asked always: a table's rows come once."""
        return await self._models.predict(name, request)

    async def _answer(
        self,
        name: str,
        version: str,
        request: Generate | Encode,
        ask: Callable[[], AsyncGenerator[Item, None]],
        say: Callable[[Outcome], None],
    ) -> AsyncGenerator[Item, None]:
        tenant, key = request.tenant, key_of(name, version, request)
        if (value := self._kept.get(tenant, key)) is not None:
            say("hit")
            for item in packed(request).decode(value):
                yield from_cache(item)
            return
        flight = self._flights.get((tenant, key))
        is_first = flight is None or not flight.is_open
        if flight is None or is_first:
            flight = self._start(key, name, version, request, ask())
        say("miss" if is_first else "shared")
        async with aclosing(flight.follow()) as coming:
            async for item in coming:
                yield item if is_first else from_cache(item)

    def _start(
        self, key: bytes, name: str, version: str, request: Generate | Encode, source: AsyncGenerator[Item, None]
    ) -> Flight[Item]:
        tenant = request.tenant

        async def end(items: list[Item] | None) -> None:
            try:
                if items and is_whole(request, items) and await self._version(name) == version:
                    self._kept.put(tenant, key, msgspec.msgpack.encode(merged(items)))
            finally:  # not before: who comes meanwhile finds one or the other
                if self._flights.get((tenant, key)) is flight:
                    del self._flights[tenant, key]

        flight: Flight[Item] = Flight(source, end)
        self._flights[tenant, key] = flight
        return flight

    async def _version(self, name: str) -> str | None:
        """None when nobody can say: the model itself will, then."""
        try:
            facts = await self._models.facts(name)
        except PlatformError:
            return None
        return facts.version if facts else None


class _View:
    def __init__(self, cache: Cache, say: Callable[[Outcome], None]) -> None:
        self._cache, self._say = cache, say

    def generate(self, name: str, request: Generate) -> AsyncGenerator[Chunk, None]:
        return self._cache.generate(name, request, self._count)

    async def encode(self, name: str, request: Encode) -> Encoded:
        return await self._cache.encode(name, request, self._count)

    async def predict(self, name: str, request: Predict) -> Predicted:
        self._count("bypass")
        return await self._cache.predict(name, request)

    def _count(self, outcome: Outcome) -> None:
        metrics.CACHE.labels(outcome).inc()
        self._say(outcome)


def is_repeatable(request: Generate) -> bool:
    """Whether asking again gives the same answer. A temperature that is left open is the model's to choose."""
    sampling = request.sampling
    return sampling.seed is not None or (sampling.temperature == 0 and "temperature" not in request.open)


def key_of(name: str, version: str, request: Generate | Encode) -> bytes:
    """A digest of everything that could change the answer, and of nothing else: neither the order in which fields were sent, nor
    whether the answer is streamed, nor the class of service."""
    asked = (
        replace(request, request_id="", priority="interactive")
        if isinstance(request, Generate)
        else replace(request, request_id="")
    )
    facts = {"kind": type(request).__name__, "model": name, "version": version, "request": asked}
    return hashlib.sha256(msgspec.json.encode(facts, order="deterministic")).digest()


def from_cache(item: Item) -> Item:
    """The same as nobody computed it."""
    if isinstance(item, Chunk) and item.compute_us:
        item = replace(item, compute_us=0)
    return item if item.usage is None else replace(item, usage=replace(item.usage, from_cache=True, compute_us=0))


def is_whole(request: Generate | Encode, items: Sequence[Chunk | Encoded]) -> bool:
    """Whether every choice came to a good end: a failure of the model or of its replica is nobody's answer but the asker's."""
    if not isinstance(request, Generate):
        return True
    ends = {
        delta.index: delta.finish_reason
        for item in items
        if isinstance(item, Chunk)
        for delta in item.deltas
        if delta.finish_reason
    }
    return items[-1].usage is not None and len(ends) == request.sampling.n and not {"abort", "error"} & set(ends.values())


def packed(request: Generate | Encode) -> msgspec.msgpack.Decoder[Any]:
    """Of the items of an answer, as they are kept."""
    return _CHUNKS if isinstance(request, Generate) else _ENCODED


def merged(items: list[Item]) -> list[Item]:
    """The same answer in one item: what is known whole is said at once."""
    if not isinstance(items[0], Chunk):
        return items
    deltas = tuple(delta for item in items if isinstance(item, Chunk) for delta in item.deltas)
    return [Chunk(deltas, items[-1].usage, items[0].begun)]


async def _alone(models: Models, name: str, request: Encode) -> AsyncGenerator[Encoded, None]:
    yield await models.encode(name, request)
