"""Bare sockets, for what no HTTP client would send; and an application that notes which paths reach it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from starlette.types import ASGIApp, Receive, Scope, Send

Address = tuple[str, int]


def address(url: str) -> Address:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


@contextlib.contextmanager
def connected(to: Address, receive_bytes: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as connection:
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(10)
        connection.connect(to)
        yield connection


def said(connection: socket.socket, seconds: float) -> tuple[bytes, bool]:
    """What comes until the other side closes or is silent for so long; and whether it closed."""
    connection.settimeout(seconds)
    received = b""
    try:
        while data := connection.recv(1 << 16):
            received += data
    except TimeoutError:
        return received, False
    except OSError:
        pass
    return received, True


def answer(to: Address, data: bytes, seconds: float = 0.5) -> tuple[bytes, bool]:
    with connected(to) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
        return said(connection, seconds)


class Noting:
    """Remembers the paths of all requests and passes them on. Answers health checks as a replica of Serve does."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.paths: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/-/"):
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"7")]})
            await send({"type": "http.response.body", "body": b"success"})
            return
        self.paths.append(scope.get("path", scope["type"]))
        await self._app(scope, receive, send)
