"""A model put to sleep or woken for an administrator, and the record of it."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from cluster.errors import DeadlineExceeded
from deployments.gateway import exchange
from deployments.gateway.routes import entrance
from deployments.models import Word

ACTIONS: dict[Word, str] = {"sleep": "model.put_to_sleep", "wake": "model.woken"}


async def tell(request: Request, model: str, word: Word) -> None:
    """Raises ModelNotFound, Conflict, Unavailable and DeadlineExceeded."""
    parts = entrance(request)
    try:
        async with asyncio.timeout(parts.settings.max_stream_s):
            await parts.models.tell(model, word)
    except TimeoutError:
        raise DeadlineExceeded(f"The model {model[:256]!r} did not {word} within {parts.settings.max_stream_s:g} s.") from None
    await parts.tenancy.record(exchange.of(request.scope), ACTIONS[word], model)
