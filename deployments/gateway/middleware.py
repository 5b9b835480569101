"""The stages that every HTTP request passes, as one list in reading order; Starlette folds it once around the routes.

Pure ASGI: a stage sees the scope, `receive` and `send`, so that a stream's chunks pass without copies or extra tasks. A stage
knows the `Exchange` in the scope and its own concern, nothing of the others.
"""

from __future__ import annotations

import asyncio
import logging

from starlette.middleware import Middleware
from starlette.types import Message, Receive, Scope, Send

from cluster.errors import PlatformError
from cluster.log import bind
from deployments.gateway import errors, exchange
from deployments.gateway.denying import NoteDenials
from deployments.gateway.errors import ClientGone
from deployments.gateway.exchange import Exchange, client_request_id
from deployments.gateway.guards import Admission, Authenticate, Body, DropControlHeaders, Gate, Limits
from deployments.gateway.keeping import Keep
from deployments.gateway.keys import Keys
from deployments.gateway.security_headers import SecurityHeaders
from deployments.gateway.stage import Stage
from deployments.gateway.tenancy import Tenancy

logger = logging.getLogger(__name__)


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
                    *((name.encode(), value.encode()) for name, value in notes.headers.items()),
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
            await self._answer(errors.public(error, notes.request_id), notes, scope["path"], send)

    async def _answer(self, error: PlatformError, notes: Exchange, path: str, send: Send) -> None:
        notes.error = error.public_code
        if notes.status:  # the head of another answer is already out; a half answer must not look whole
            raise RuntimeError("the answer broke after its head")
        body = errors.encode(error, path)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        headers += errors.retry_headers(error)
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


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


def pipeline(
    *,
    gate: Gate,
    keys: Keys,
    public: frozenset[str],
    max_body_bytes: int,
    tenancy: Tenancy,
    paths: frozenset[str],
    hosts: frozenset[str] = frozenset(),
) -> list[Middleware]:
    """The stages, outermost first. The order is the policy: refuse as early and as cheaply as can be."""
    return [
        Middleware(SecurityHeaders),
        Middleware(RequestId),
        Middleware(AccessLog),
        Middleware(ErrorEnvelope),
        Middleware(NoteDenials, denials=tenancy.denials, paths=paths),
        Middleware(Keep, keeper=tenancy.keeper),
        Middleware(DropControlHeaders),
        Middleware(Admission, gate=gate, public=public),
        Middleware(Limits, max_body_bytes=max_body_bytes, hosts=hosts),
        Middleware(Authenticate, keys=keys, public=public),
        Middleware(Body, max_body_bytes=max_body_bytes),
        Middleware(Disconnect),
    ]
