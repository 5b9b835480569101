"""Stands before Serve's own HTTP server, in the proxy or in the replica that listens itself.

Serve obeys some headers of a request and answers with a request identifier of its own beside ours. Named in
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` (as `CALLBACK`), `middlewares` puts one stage outside of Serve's: it takes the
control headers before Serve reads them and lets only our identifier out. Without it Serve listens to callers.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import Message, Receive, Scope, Send

from deployments.gateway.exchange import client_request_id
from deployments.gateway.guards import is_control
from deployments.gateway.stage import Stage

CALLBACK = "deployments.gateway.front:middlewares"


def middlewares() -> list[Middleware]:
    return [Middleware(Front)]


class Front(Stage):
    """Keeps the caller's own identifier, and nothing else of what would steer Serve."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
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
