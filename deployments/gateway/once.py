"""`Idempotency-Key` over HTTP: the work of such a call is a task of its own, which no caller's leaving stops.

The caller listens to the task's tape. The answer is stored before its last bytes are sent, so whoever got all of it finds it again;
it is stored and paid in one transaction, so that no killed gateway leaves a call that was paid and runs once more.
An answer that failed, also in mid-stream, is not kept: the next call with the key runs. Who may, `cluster/tenancy/idempotency.py`
says; scope and principal were checked before.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from cluster import metrics
from cluster.errors import InProgress, InvalidRequest, KeyReused, Overloaded
from cluster.tenancy.idempotency import LEASE_S, Answer, Idempotency, Replay, Run
from cluster.tenancy.metering import Running
from cluster.types import Principal
from deployments.gateway import exchange
from deployments.gateway.errors import ClientGone

logger = logging.getLogger(__name__)

Handle = Callable[[Request], Awaitable[Response]]
Result = TypeVar("Result")

HEADER = b"idempotency-key"
STORED_HEADERS = (b"content-type", b"cache-control", b"x-accel-buffering")
AHEAD = 256
"""Messages that wait for a slow caller."""

PATIENCE_S = 20.0
"""A caller that takes nothing for so long is gone; shorter than the stream's own patience with us."""


def key_of(request: Request) -> str | None:
    """The key of a call that changes or costs something, if it has one. Raises InvalidRequest for several."""
    values = [value for name, value in request.scope["headers"] if name == HEADER]
    if not values or request.method in ("GET", "HEAD", "OPTIONS"):
        return None
    if len(values) > 1:
        raise InvalidRequest("A request has at most one Idempotency-Key.", param="Idempotency-Key")
    return str(values[0].decode("latin-1"))


def owner_of(principal: Principal | None) -> str:
    """Within what keys are unique: a project, or the organization that somebody administers. No id of a project has a slash."""
    assert principal is not None, "public routes take no keys"
    return principal.tenant or f"organization/{principal.organization}"


class Once:
    """The calls with keys that one gateway works on: at most `most`, whether their callers are still there or not."""

    def __init__(self, keys: Idempotency, most: int = 512) -> None:
        self._keys = keys
        self._most = most
        self._runs: dict[str, Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._renewing: asyncio.Task[None] | None = None
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="idempotency")

    async def answer(self, key: str, request: Request, handle: Handle, *, is_stored: bool = True) -> Response:
        """Raises what `handle` raises before it answers, and what `Idempotency.begin` raises. An answer that isn't stored is not
        given again, and its call not done again."""
        if len(self._tasks) >= self._most:
            raise Overloaded(f"The gateway works on {len(self._tasks)} requests with keys already.", retry_after_s=1.0)
        tape = Tape(self._keys.bounds.answer_bytes if is_stored else 0)
        task = asyncio.ensure_future(self._play(key, request, handle, tape))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return Listener(await tape.next(), tape)
        except BaseException:
            tape.leave()
            raise

    async def _play(self, key: str, request: Request, handle: Handle, tape: Tape) -> None:
        """What happens is on the tape, failures too."""
        try:
            begun = await self._beside(self._keys.begin, owner_of(exchange.of(request.scope).principal), key, _digest(request))
            metrics.IDEMPOTENT.labels("replayed" if isinstance(begun, Replay) else "executed").inc()
            if isinstance(begun, Replay):
                await replayed(begun.answer)(request.scope, _never, tape.send)
            else:
                await self._execute(begun, request, handle, tape)
            await tape.end()
        except Exception as error:
            if isinstance(error, InProgress | KeyReused):
                metrics.IDEMPOTENT.labels("refused").inc()
            if not tape.has_listener:
                logger.warning("failed after its caller had left", exc_info=error)
            await tape.end(error)

    async def _execute(self, run: Run, request: Request, handle: Handle, tape: Tape) -> None:
        theirs = exchange.of(request.scope)
        notes = replace(theirs, status=0, error=None)  # what becomes of the caller, or became already, doesn't matter to the work
        unsettled: list[Running] = []
        notes.on_end = unsettled.append
        own = Request({**request.scope, exchange.KEY: notes}, _never)
        self._runs[run.id] = run
        self._keep_renewing()
        succeeded = False
        try:
            response = await handle(own)
            await response(own.scope, _never, tape.send)
            succeeded = tape.is_whole and 200 <= tape.status < 300 and notes.error is None
        finally:
            await asyncio.shield(self._settle(run, tape, unsettled, succeeded))
            theirs.model, theirs.usage, theirs.first_token_s = notes.model, notes.usage, notes.first_token_s
            theirs.error = theirs.error or notes.error
            if not tape.has_listener:
                notes.count_tokens()
                logger.info("finished after its caller had left", extra={"tenant": notes.tenant, "kept": succeeded})

    async def _settle(self, run: Run, tape: Tape, unsettled: Sequence[Running], succeeded: bool) -> None:
        along = partial(self._keys.finish_on, run=run, answer=tape.answer) if succeeded else None
        try:
            for running in unsettled:
                await running.settle(along)
            if not succeeded:
                await self._beside(self._keys.release, run)
            elif not unsettled:
                await self._beside(self._keys.finish, run, tape.answer)
        except Exception:
            logger.exception("what became of an idempotent request could not be stored; its lease will end")
        finally:
            del self._runs[run.id]

    def _keep_renewing(self) -> None:
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.ensure_future(self._renew())

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            if not self._runs:
                return
            try:
                await self._beside(self._keys.renew, list(self._runs.values()))
            except Exception:
                logger.exception("leases could not be renewed")

    async def _beside(self, work: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)


class Tape:
    """What an answer sends: passed on while somebody listens, and kept up to `most` bytes. The last message waits for `end`."""

    def __init__(self, most: int) -> None:
        self.status = 0
        self.is_whole = False
        self.has_listener = True
        self._headers: tuple[tuple[str, str], ...] = ()
        self._kept: list[bytes] | None = []
        self._room = most
        self._last: Message | None = None
        self._queue: asyncio.Queue[Message | Exception | None] = asyncio.Queue(AHEAD)

    @property
    def answer(self) -> Answer | None:
        """None: it was too long to keep."""
        return None if self._kept is None else Answer(self.status, self._headers, b"".join(self._kept))

    async def send(self, message: Message) -> None:
        """The answer's ASGI `send`. Never fails."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            told = [(name.lower(), value) for name, value in message.get("headers", ())]
            self._headers = tuple((name.decode(), value.decode("latin-1")) for name, value in told if name in STORED_HEADERS)
        else:
            self._keep(message.get("body", b""))
            if not message.get("more_body", False):
                self.is_whole, self._last = True, message
                return
        await self._pass(message)

    def _keep(self, body: bytes) -> None:
        self._room -= len(body)
        if self._room < 0:
            self._kept = None
        elif self._kept is not None:
            self._kept.append(body)

    async def _pass(self, item: Message | Exception | None) -> None:
        if self.has_listener:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self._queue.put(item)
            except TimeoutError:
                self.leave()

    async def end(self, error: Exception | None = None) -> None:
        if error is None and self._last is not None:
            await self._pass(self._last)
        await self._pass(error)

    async def next(self) -> Message | None:
        """What comes next; None after the last. Raises what ended the answer early, and ClientGone when it didn't wait."""
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def leave(self) -> None:
        """Nobody listens any more; whoever still does hears of it."""
        self.has_listener = False
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(ClientGone())


class Listener(Response):
    """The answer for the caller, from the tape."""

    def __init__(self, first: Message | None, tape: Tape) -> None:
        assert first is not None, "an answer has a head"
        self.status_code = first["status"]
        self.background = None
        self.raw_headers = list(first["headers"])
        self._first, self._tape = first, tape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message: Message | None = self._first
        try:
            while message is not None:
                async with asyncio.timeout(PATIENCE_S):
                    await send(message)
                message = await self._tape.next()
        except TimeoutError:
            raise ClientGone from None
        finally:
            self._tape.leave()


def replayed(answer: Answer) -> Response:
    """The stored answer as it was, marked."""
    return Response(answer.body, answer.status, {**dict(answer.headers), "idempotent-replayed": "true"})


def _digest(request: Request) -> bytes:
    """Everything that makes it this request: another one with the same key is refused."""
    parts = (
        request.method.encode(),
        request.scope["path"].encode(),
        request.scope["query_string"],
        exchange.of(request.scope).body,
    )
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


async def _never() -> Message:
    never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
    return await never
