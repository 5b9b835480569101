"""From a parsed request to an encoder's answer, the same for HTTP and for handles. What is long is done beside the event loop."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

import msgspec

from cluster.errors import DeadlineExceeded
from cluster.types import Encode, Encoded
from deployments.gateway.answering import Part
from deployments.gateway.exchange import Exchange
from deployments.gateway.openai.encoding import ClassifyCall, EmbeddingCall, RerankCall
from deployments.gateway.scopes import permit_model
from deployments.router import Models

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


async def answer(models: Models, operation: str, body: dict[str, Any], notes: Exchange, seconds: float) -> Part:
    """Raises PlatformError. Cancelling this cancels the model's work."""
    call = await _parse(operation, body, notes)
    said: Part = await _beside(call.asked, call.answer, await _encoded(models, call, notes, seconds))
    return said


async def rendered(models: Models, operation: str, body: dict[str, Any], notes: Exchange, seconds: float) -> bytes:
    """The answer as JSON. Raises PlatformError. Cancelling this cancels the model's work."""
    call = await _parse(operation, body, notes)
    encoded = await _encoded(models, call, notes, seconds)
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
    permit_model(notes.principal, call.model)
    notes.model = call.model
    return call


async def _encoded(models: Models, call: Call, notes: Exchange, seconds: float) -> Encoded:
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
