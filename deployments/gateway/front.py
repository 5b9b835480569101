"""Stands before Serve's own HTTP server, in the proxy or in the replica that listens itself.

Serve obeys some headers of a request and answers with a request identifier of its own beside ours. Named in
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` (as `CALLBACK`), `middlewares` puts one stage outside of Serve's: it takes the
control headers before Serve reads them, lets only our identifier out, and keeps Serve's own pages from callers where no HAProxy
does. Without it Serve listens to callers. Being asked for them is also the moment to choose the protocol of the server to come.
"""

from __future__ import annotations

import os

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import NotFound
from deployments.gateway import errors, wire
from deployments.gateway.exchange import client_request_id, new_request_id
from deployments.gateway.guards import is_control
from deployments.gateway.security_headers import ALWAYS
from deployments.gateway.stage import Stage

CALLBACK = "deployments.gateway.front:middlewares"
SERVES_OWN = "/-/"
"""Begin the paths of Serve's own pages, which tell of routes and health to everybody."""


def middlewares() -> list[Middleware]:
    wire.install()
    return [Middleware(Front, is_outermost=os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1")]


class Front(Stage):
    """Keeps the caller's own identifier, and nothing else of what would steer Serve."""

    def __init__(self, app: ASGIApp, *, is_outermost: bool = True) -> None:
        """`is_outermost`: no HAProxy is in front, whose questions after a replica's health come by the same paths."""
        super().__init__(app)
        self._is_outermost = is_outermost

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_outermost and scope["path"].startswith(SERVES_OWN):
            await _not_found(send)
            return
        theirs = client_request_id(scope["headers"]) or ""
        scope["headers"] = [(name, value) for name, value in scope["headers"] if not is_control(name)]
        scope["headers"].append((b"x-client-request-id", theirs.encode("latin-1", "replace")))

        async def once(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = first_of(b"x-request-id", message["headers"])
            await send(message)

        await self.app(scope, receive, once)


def first_of(name: bytes, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers without repetitions of `name`; the gateway's comes first, Serve appends its own."""
    kept, seen = [], False
    for key, value in headers:
        if bytes(key).lower() != name or not seen:
            kept.append((key, value))
        seen = seen or bytes(key).lower() == name
    return kept


async def _not_found(send: Send) -> None:
    body = errors.encode(NotFound("there is no such route"))
    length = (b"content-length", str(len(body)).encode())
    named = (b"x-request-id", new_request_id().encode())
    headers = [(b"content-type", b"application/json"), length, named, *ALWAYS]
    await send({"type": "http.response.start", "status": 404, "headers": headers})
    await send({"type": "http.response.body", "body": body})
