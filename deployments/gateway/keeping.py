"""Inputs and outputs on their way are taken for keeping, where the project consented and the call is in the sample."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.tenancy.keeper import Keeper, drop
from cluster.tenancy.kept_files import KeptCall
from deployments.gateway import exchange
from deployments.gateway.answering import Part
from deployments.gateway.exchange import Exchange
from deployments.gateway.stage import Stage


class Keep(Stage):
    """Copies references to what is sent, up to a bound, and hands them over at the end."""

    def __init__(self, app: ASGIApp, keeper: Keeper | None) -> None:
        super().__init__(app)
        self._keeper = keeper

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._keeper is None:
            await self.app(scope, receive, send)
            return
        notes, taken = exchange.of(scope), Taken(self._keeper)

        async def copied(message: Message) -> None:
            taken.take(notes, message)
            await send(message)

        try:
            await self.app(scope, receive, copied)
        finally:
            taken.hand_over(notes, getattr(scope.get("route"), "path", ""))


class Taken:
    """What was sent so far, of a call that is to be kept."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._parts: list[bytes] | None = None
        self._room = keeper.call_bytes
        self._is_whole = False

    def take(self, notes: Exchange, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._parts = [] if self._keeper.wants(notes.tenant, notes.request_id) else None
        elif self._parts is not None:
            body = message.get("body", b"")
            self._room -= len(body)
            self._is_whole = not message.get("more_body", False)
            if self._room >= 0:
                self._parts.append(body)

    def hand_over(self, notes: Exchange, operation: str) -> None:
        """Calls of a model alone: others have nothing to keep, and a replayed answer was kept when it was made."""
        if self._parts is None or notes.model is None:
            return
        if self._room < 0 or len(notes.body) > self._keeper.call_bytes:
            drop("too_long")
            return
        told, said = (raw.decode(errors="replace") for raw in (notes.body, b"".join(self._parts)))
        self._keeper.offer(kept(notes, operation, told, said, self._is_whole))


class Spoken:
    """The same for a call over a handle: JSON objects instead of bytes, put down as an event stream would have them."""

    def __init__(self, keeper: Keeper | None) -> None:
        self._keeper = keeper
        self._parts: list[bytes] = []
        self._room = keeper.call_bytes if keeper else 0

    def take(self, notes: Exchange, part: Part) -> None:
        if self._keeper is not None and notes.model is not None and self._keeper.wants(notes.tenant, notes.request_id):
            event = b"data: " + msgspec.json.encode(part)
            self._room -= len(event)
            if self._room >= 0:
                self._parts.append(event)

    def hand_over(self, notes: Exchange, operation: str, body: Mapping[str, Any]) -> None:
        if self._keeper is None or not self._parts:
            return
        told = msgspec.json.encode(body)
        if self._room < 0 or len(told) > self._keeper.call_bytes:
            drop("too_long")
            return
        said = self._parts[0].removeprefix(b"data: ") if not body.get("stream") else b"\n\n".join(self._parts)
        self._keeper.offer(kept(notes, operation, told.decode(), said.decode(), notes.status == 200))


def kept(notes: Exchange, operation: str, told: str, said: str, is_whole: bool) -> KeptCall:
    return KeptCall(
        request_id=notes.request_id,
        at=time.time() - notes.elapsed_s,
        tenant=notes.tenant,
        key_id=notes.principal.key_id if notes.principal else "",
        operation=operation,
        model=exchange.printable(notes.model or ""),
        status=notes.status,
        is_complete=is_whole and notes.error is None,
        input=told,
        output=said,
        prompt_tokens=notes.usage.prompt_tokens if notes.usage else None,
        completion_tokens=notes.usage.completion_tokens if notes.usage else None,
    )
