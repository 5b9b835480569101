"""The entrance for handles: the same operations as over HTTP, with the same checks, bounds, errors and records.

An operation yields JSON objects as dictionaries: one for a plain answer, one for each chunk of a streamed one. What goes wrong is
raised as the `PlatformError` that HTTP would have rendered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from cluster.errors import InvalidRequest, NotFound, PlatformError
from deployments.gateway import answering, denying, encoding, errors, keeping, limiting, limits, predicting, scopes
from deployments.gateway.answering import Part
from deployments.gateway.entrance import Entrance
from deployments.gateway.exchange import Exchange
from deployments.gateway.oip.infer import InferCall
from deployments.gateway.oip.wire import Body
from deployments.gateway.openai import models

logger = logging.getLogger(__name__)

OPERATIONS = {
    "chat.completions": "inference",
    "completions": "inference",
    "embeddings": "inference",
    "rerank": "inference",
    "classify": "inference",
    "infer": "inference",
    "models.list": "inference",
    "models.retrieve": "inference",
}
"""What a handle may ask for, and the scope that it takes."""


async def call(entrance: Entrance, key: str, operation: str, body: Mapping[str, Any]) -> AsyncGenerator[Part, None]:
    """Raises PlatformError; a fault of ours arrives without its words, as over HTTP."""
    notes, operation = Exchange(method="CALL"), str(operation)
    spoken = keeping.Spoken(entrance.tenancy.keeper)
    try:
        with entrance.gate.admit():
            async with aclosing(_admitted(entrance, key, operation, body, notes)) as answers:
                async for answer in answers:
                    spoken.take(notes, answer)
                    yield answer
        notes.status = 200
    except Exception as error:
        public = errors.public(error, notes.request_id)
        notes.status, notes.error = public.status, public.public_code
        if isinstance(error, PlatformError):
            denying.note(entrance.tenancy.denials, notes, error, operation if operation in OPERATIONS else "unmatched")
        if not isinstance(error, PlatformError) or error.status == 500:
            logger.exception("call failed", extra={"request_id": notes.request_id})
        raise public from None
    finally:
        spoken.hand_over(notes, operation, body)
        notes.record(operation if operation in OPERATIONS else None)


async def _admitted(
    entrance: Entrance, key: str, operation: str, body: Mapping[str, Any], notes: Exchange
) -> AsyncGenerator[Part, None]:
    notes.principal = await entrance.keys.principal(key)
    if operation not in OPERATIONS:
        raise NotFound(f"There is no operation {operation[:64]!r}; there are {', '.join(OPERATIONS)}.")
    scopes.permit(notes.principal, OPERATIONS[operation])
    bounds = entrance.settings
    integers = limits.UINT64 if operation == "infer" else limits.INT64
    tree = limits.through_json(body, bounds.max_body_bytes, bounds.max_json_depth, integers)
    if operation == "models.list":
        yield models.listing(*await limiting.permitted(entrance, notes))
    elif operation == "models.retrieve":
        yield models.card(models.find(*await limiting.permitted(entrance, notes), str(tree.get("model", ""))))
    elif operation == "infer":
        yield await _inferred(entrance, tree, notes)
    elif operation in encoding.KINDS:
        yield await encoding.answer(entrance, operation, tree, notes)
    else:
        async with aclosing(_generated(entrance, answering.parse(operation, tree, notes), notes)) as answers:
            async for answer in answers:
                yield answer


async def _inferred(entrance: Entrance, tree: dict[str, Any], notes: Exchange) -> Part:
    """Tensors in and out as JSON has them: nothing lies behind it."""
    model, version = tree.get("model"), tree.get("model_version")
    if not isinstance(model, str) or not isinstance(version, str | None):
        raise InvalidRequest("model and model_version must be texts.", param="model")

    def read() -> InferCall:
        return InferCall(model, version, Body(tree, memoryview(b"")), request_id=notes.request_id, tenant=notes.tenant)

    call = await asyncio.to_thread(read)
    found = await predicting.predicted(entrance, call, notes)
    answer, behind = await asyncio.to_thread(call.answer, found)
    if behind:
        raise InvalidRequest("Over a handle tensors come as JSON: leave binary_data out.", param="outputs")
    return answer


async def _generated(entrance: Entrance, call: answering.Call, notes: Exchange) -> AsyncGenerator[Part, None]:
    if not call.streams:
        yield await answering.whole(entrance, call, notes)
        return
    async with aclosing(answering.parts(entrance, call, notes, silence_s=entrance.settings.max_stream_s)) as batches:
        async for said in batches:
            for part in said.parts:
                yield part
