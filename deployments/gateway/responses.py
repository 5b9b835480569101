"""Answers on the wire: plain JSON, and an event stream that stops its source whichever way it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.errors import PlatformError
from deployments.gateway import errors, exchange
from deployments.gateway.answering import Said
from deployments.gateway.errors import ClientGone
from deployments.gateway.openai import sse

logger = logging.getLogger(__name__)

WRITE_S = 30.0
"""A caller that takes no byte for so long is gone."""


def json_response(content: Mapping[str, Any] | Sequence[Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


async def event_stream(parts: AsyncGenerator[Said, None]) -> Response:
    """Waits for the first words, so that what fails before them is a plain error answer; see `EventStream` for the rest."""
    try:
        first = await anext(parts)
    except BaseException:
        await parts.aclose()
        raise
    return EventStream(first, parts)


class EventStream(Response):
    """Chunks as server-sent events, one write for what is said at once. Silence becomes a keepalive comment."""

    def __init__(self, first: Said, rest: AsyncGenerator[Said, None]) -> None:
        self.status_code = 200
        self.background = None
        self.raw_headers = [(b"content-type", sse.CONTENT_TYPE), (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            last = await self._stream(scope, send)
            await _write(send, last, more=False)

    async def _stream(self, scope: Scope, send: Send) -> bytes:
        """Everything but the last write, whose bytes it returns."""
        said = self._first
        try:
            while not said.last:
                await _write(send, sse.frames(said.parts) or sse.KEEPALIVE)
                said = await anext(self._rest)
            return sse.frames(said.parts) + sse.DONE
        except ClientGone:
            raise
        except Exception as error:
            return sse.error(_broken(error, exchange.of(scope)))


async def _write(send: Send, body: bytes, *, more: bool = True) -> None:
    """Raises ClientGone."""
    try:
        async with asyncio.timeout(WRITE_S):
            await send({"type": "http.response.body", "body": body, "more_body": more})
    except (TimeoutError, OSError):
        raise ClientGone from None


def _broken(error: Exception, notes: exchange.Exchange) -> PlatformError:
    if not isinstance(error, PlatformError) or error.status == 500:
        logger.error("stream failed", exc_info=error)
    public = errors.public(error, notes.request_id)
    notes.error = public.public_code
    return public
