"""What a stage of the gateway is: a pure ASGI middleware for HTTP that knows one concern."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class Stage:
    """A middleware for HTTP; lifespan events pass by."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.handle if scope["type"] == "http" else self.app)(scope, receive, send)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError
