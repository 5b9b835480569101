"""The stages that every HTTP request passes, as one list in reading order; Starlette folds it once around the routes.

Pure ASGI: a stage sees the scope, `receive` and `send`, so that a stream's chunks pass without copies or extra tasks. A stage
knows the `Exchange` in the scope and its own concern, nothing of the others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import InvalidRequest, Overloaded, PayloadTooLarge, PlatformError
from cluster.log import bind
from deployments.gateway import errors, exchange, limits
from deployments.gateway.errors import ClientGone
from deployments.gateway.exchange import Exchange, client_request_id
from deployments.gateway.keys import Keys, bearer

logger = logging.getLogger(__name__)

CONTROL_HEADERS = frozenset(
    {
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve-multiplexed-model-id",
        b"x-session-id",
        b"x-request-id",
        b"x-client-request-id",
        b"x-ray-authorization",
    }
)
"""Headers by which Ray Serve lets a caller steer it, `_` written as `-`. Ours is the only hand on that wheel."""

CONTROL_PREFIXES = (b"x-serve-", b"x-ray-")


class Gate:
    """Counts the calls inside, over HTTP and handles together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.inside = 0

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Raises Overloaded when full."""
        if self.inside >= self.limit:
            raise Overloaded(f"The gateway works on {self.inside} requests already, its limit.", retry_after_s=1.0)
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


class Stage:
    """A middleware for HTTP; lifespan events pass by."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.handle if scope["type"] == "http" else self.app)(scope, receive, send)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class RequestId(Stage):
    """Makes the request's identifier and answers with it."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        notes = Exchange(method=scope["method"], client_request_id=client_request_id(scope["headers"]))
        scope[exchange.KEY] = notes

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", notes.request_id.encode()),
                    (b"openai-processing-ms", str(round(notes.elapsed_s * 1000)).encode()),
                ]
            await send(message)

        with bind(request_id=notes.request_id):
            await self.app(scope, receive, stamped)


class AccessLog(Stage):
    """One record and one count for a request, however it ended."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        notes = exchange.of(scope)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                notes.status = message["status"]
            notes.bytes_out += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            notes.record(getattr(scope.get("route"), "path", None))


class ErrorEnvelope(Stage):
    """Turns whatever is raised below into the envelope; nothing of ours leaks, and a caller who left gets nothing."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        notes = exchange.of(scope)
        try:
            await self.app(scope, receive, send)
        except ClientGone:
            notes.error = "client_gone"
        except Exception as error:
            if not isinstance(error, PlatformError) or error.status == 500:
                logger.exception("request failed")
            await self._answer(errors.public(error, notes.request_id), notes, send)

    async def _answer(self, error: PlatformError, notes: Exchange, send: Send) -> None:
        notes.error = error.public_code
        if notes.status:  # the head of another answer is already out; a half answer must not look whole
            raise RuntimeError("the answer broke after its head")
        body = errors.encode(error)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        headers += errors.retry_headers(error)
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class DropControlHeaders(Stage):
    """Takes Serve's own control headers out of what a caller sent."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["headers"] = [(name, value) for name, value in scope["headers"] if not is_control(name)]
        await self.app(scope, receive, send)


def is_control(name: bytes) -> bool:
    name = name.lower().replace(b"_", b"-")
    return name in CONTROL_HEADERS or name.startswith(CONTROL_PREFIXES)


class Admission(Stage):
    """Refuses before any work when the gateway is full. Probes are always answered."""

    def __init__(self, app: ASGIApp, gate: Gate, public: frozenset[str]) -> None:
        super().__init__(app)
        self._gate, self._public = gate, public

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in self._public:
            await self.app(scope, receive, send)
        else:
            with self._gate.admit():
                await self.app(scope, receive, send)


class Limits(Stage):
    """What the head alone tells: exactly one Host, no encoded body, no body that announces itself as too long."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        super().__init__(app)
        self._max_body_bytes = max_body_bytes

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = [name for name, _ in scope["headers"]]
        headers = dict(scope["headers"])
        if names.count(b"host") != 1:
            raise InvalidRequest(f"A request needs exactly one Host header, not {names.count(b'host')}.")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise InvalidRequest("An encoded body is not accepted: send it without Content-Encoding.")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18:
            raise InvalidRequest("Content-Length is not a number.")
        if int(length) > self._max_body_bytes:
            raise PayloadTooLarge(f"The body of {int(length)} bytes is longer than {self._max_body_bytes}.")
        await self.app(scope, receive, send)


class Authenticate(Stage):
    """Puts the principal into the Exchange. Everything but the public paths needs a key, routes that don't exist included."""

    def __init__(self, app: ASGIApp, keys: Keys, public: frozenset[str]) -> None:
        super().__init__(app)
        self._keys, self._public = keys, public

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in self._public:
            exchange.of(scope).principal = await self._keys.principal(bearer(scope["headers"]))
        await self.app(scope, receive, send)


class Body(Stage):
    """Reads the body, of known callers only, and counts the bytes that really come."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        super().__init__(app)
        self._max_body_bytes = max_body_bytes

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange.of(scope).body = await limits.read_body(receive, self._max_body_bytes)
        await self.app(scope, receive, send)


class Disconnect(Stage):
    """Cancels the work of a request as soon as its caller hangs up; below it, disconnection is plain cancellation."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self.app(scope, _never, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientGone
            work.result()
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _never() -> Message:
    """The `receive` of an app whose body was read for it."""
    never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
    return await never


def pipeline(*, gate: Gate, keys: Keys, public: frozenset[str], max_body_bytes: int) -> list[Middleware]:
    """The stages, outermost first. The order is the policy: refuse as early and as cheaply as can be."""
    return [
        Middleware(RequestId),
        Middleware(AccessLog),
        Middleware(ErrorEnvelope),
        Middleware(DropControlHeaders),
        Middleware(Admission, gate=gate, public=public),
        Middleware(Limits, max_body_bytes=max_body_bytes),
        Middleware(Authenticate, keys=keys, public=public),
        Middleware(Body, max_body_bytes=max_body_bytes),
        Middleware(Disconnect),
    ]
