"""From a parsed request to an encoder's answer, the same for HTTP and for handles. What is long is done beside the event loop."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

import msgspec

from cluster.errors import DeadlineExceeded
from cluster.types import Encode, Encoded
from deployments.gateway import limiting
from deployments.gateway.answering import Part
from deployments.gateway.entrance import Entrance
from deployments.gateway.exchange import Exchange
from deployments.gateway.openai.encoding import ClassifyCall, EmbeddingCall, RerankCall

OFF_LOOP_INPUTS = 16
"""A call of more inputs is parsed and rendered in a thread."""

KINDS: dict[str, type[EmbeddingCall] | type[RerankCall] | type[ClassifyCall]] = {
    "embeddings": EmbeddingCall,
    "rerank": RerankCall,
    "classify": ClassifyCall,
}
"""Operations of encoders, by the name that handles use."""


class Call(Protocol):
    """One request of one API. Does no I/O."""

    @property
    def model(self) -> str: ...
    @property
    def asked(self) -> Encode: ...
    def answer(self, encoded: Encoded) -> Part: ...


async def answer(entrance: Entrance, operation: str, body: dict[str, Any], notes: Exchange) -> Part:
    """Raises PlatformError. Cancelling this cancels the model's work."""
    call = await _parse(operation, body, notes)
    said: Part = await _beside(call.asked, call.answer, await _encoded(entrance, call, notes))
    return said


async def rendered(entrance: Entrance, operation: str, body: dict[str, Any], notes: Exchange) -> bytes:
    """The answer as JSON. Raises PlatformError. Cancelling this cancels the model's work."""
    call = await _parse(operation, body, notes)
    encoded = await _encoded(entrance, call, notes)
    said: bytes = await _beside(call.asked, lambda found: msgspec.json.encode(call.answer(found)), encoded)
    return said


async def _parse(operation: str, body: dict[str, Any], notes: Exchange) -> Call:
    kind = KINDS[operation]
    facts: dict[str, Any] = {"request_id": notes.request_id, "answer_id": notes.answer_id(kind.prefix), "tenant": notes.tenant}

    def read() -> Call:
        return kind(body, **facts, created=int(time.time()))

    inputs = body.get("input", body.get("documents"))
    is_short = not isinstance(inputs, list) or len(inputs) <= OFF_LOOP_INPUTS
    call = read() if is_short else await asyncio.to_thread(read)
    notes.model = call.model
    return call


async def _encoded(entrance: Entrance, call: Call, notes: Exchange) -> Encoded:
    seconds = entrance.settings.max_stream_s
    async with limiting.admitted(entrance, notes, call.model, [call.asked]) as models:
        try:
            async with asyncio.timeout(seconds):
                encoded = await models.encode(call.model, call.asked)
        except TimeoutError:
            raise DeadlineExceeded(f"The answer took longer than {seconds:g} s.") from None
        notes.usage = encoded.usage
        return encoded


async def _beside(asked: Encode, work: Any, encoded: Encoded) -> Any:
    if len(asked.texts) + len(asked.ids) <= OFF_LOOP_INPUTS:
        return work(encoded)
    return await asyncio.to_thread(work, encoded)
