"""From a parsed request to its answer, the same for HTTP and for handles: ask the models, relay, put together or pass on."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from cluster.errors import ModelError
from cluster.types import Chunk, Generate, Usage
from deployments.gateway import limiting
from deployments.gateway.entrance import Entrance
from deployments.gateway.exchange import Exchange
from deployments.gateway.openai.chat import ChatCall
from deployments.gateway.openai.completions import CompletionCall
from deployments.gateway.openai.progress import Collected
from deployments.gateway.relay import Relay
from deployments.models import Answers

Part = Mapping[str, object]
"""One JSON object of a streamed answer."""

KINDS: dict[str, type[ChatCall] | type[CompletionCall]] = {"chat.completions": ChatCall, "completions": CompletionCall}
"""Operations that generate, by the name that handles use."""


class Call(Protocol):
    """One request of one API: what to ask of which model, and how to say what comes back. Does no I/O."""

    @property
    def model(self) -> str: ...
    @property
    def streams(self) -> bool: ...
    @property
    def choices(self) -> int: ...
    @property
    def calls(self) -> tuple[Generate, ...]: ...
    def whole(self, collected: Collected) -> Part: ...
    def parts(self, chunk: Chunk) -> Sequence[Part]: ...
    def usage(self) -> Usage: ...
    @property
    def failure(self) -> ModelError | None: ...
    def end(self) -> Sequence[Part]: ...


def parse(operation: str, body: dict[str, Any], notes: Exchange) -> Call:
    """Raises InvalidRequest, and ModelNotFound for a model that the caller's key is not for."""
    kind = KINDS[operation]
    call = kind(
        body,
        request_id=notes.request_id,
        answer_id=notes.answer_id(kind.prefix),
        tenant=notes.tenant,
        created=int(time.time()),
    )
    notes.model = call.model
    return call


class Said(NamedTuple):
    """What is said at once: any number of chunks, none after a silence. Nothing follows the `last`."""

    parts: Sequence[Part]
    last: bool = False


async def whole(entrance: Entrance, call: Call, notes: Exchange) -> Part:
    """The answer in one piece. Cancelling this cancels the models' work."""
    async with limiting.admitted(entrance, notes, call.model, call.calls) as models:
        return await _whole(models, call, notes, entrance.settings.max_stream_s)


async def parts(entrance: Entrance, call: Call, notes: Exchange, silence_s: float) -> AsyncGenerator[Said, None]:
    """The answer as it comes; something empty after `silence_s` without news. Closing this cancels the models' work.

    The last words are said when the call is settled: whoever has a whole answer has paid for it, should this process die now.
    """
    seconds, last = entrance.settings.max_stream_s, None
    async with (
        limiting.admitted(entrance, notes, call.model, call.calls, streams=True) as models,
        aclosing(_parts(models, call, notes, seconds, silence_s)) as answer,
    ):
        async for said in answer:
            if said.last:
                last = said
                break
            yield said
    if last is not None:
        yield last


async def _whole(models: Answers, call: Call, notes: Exchange, seconds: float) -> Part:
    relay = ask(models, call, seconds)
    try:
        collected = Collected(call.choices)
        async for batch in relay.batches(seconds):
            notes.heard(batch)
            for chunk in batch:
                collected.add(chunk)
        notes.usage = collected.usage()
        return call.whole(collected)
    finally:
        await relay.aclose()


async def _parts(models: Answers, call: Call, notes: Exchange, seconds: float, silence_s: float) -> AsyncGenerator[Said, None]:
    relay, said = ask(models, call, seconds), list[Part]()
    try:
        async with aclosing(relay.batches(silence_s)) as batches:
            async for batch in batches:
                if batch:
                    notes.heard(batch)
                said = [part for chunk in batch for part in call.parts(chunk)]
                if relay.has_ended:
                    break  # the last words go with the end
                if said or not batch:
                    yield Said(said)
                    said = []
        notes.usage = call.usage()
        if failure := call.failure:
            if said:
                yield Said(said)
            raise failure
        yield Said([*said, *call.end()], last=True)
    finally:
        await relay.aclose()


def ask(models: Answers, call: Call, seconds: float) -> Relay[Chunk]:
    """Start every call of the request; index 0 of call `k` becomes index `k * n`."""
    each = call.choices // len(call.calls)
    return Relay([_shifted(models.generate(call.model, asked), k * each) for k, asked in enumerate(call.calls)], seconds)


def _shifted(stream: AsyncGenerator[Chunk, None], by: int) -> AsyncGenerator[Chunk, None]:
    return stream if by == 0 else _shift(stream, by)


async def _shift(stream: AsyncGenerator[Chunk, None], by: int) -> AsyncGenerator[Chunk, None]:
    async with aclosing(stream):
        async for chunk in stream:
            yield replace(chunk, deltas=tuple(replace(delta, index=delta.index + by) for delta in chunk.deltas))
