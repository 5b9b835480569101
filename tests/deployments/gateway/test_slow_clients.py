"""Clients that take their time, or more than their share: each is let go, and meanwhile the others are served.

The bounds are ours with shorter times. The last test aims the same clients at uvicorn's own protocol, which lets them stay.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from uvicorn.protocols.http import auto
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cluster.settings import GatewaySettings
from deployments.gateway import front, guards, wire
from deployments.gateway.wire import Bounds, Wire
from tests.deployments.gateway.conftest import Server, eventually, serving
from tests.deployments.gateway.sockets import Address, address, answer, connected, said
from tests.deployments.gateway.whole import whole
from tests.fakes import KeyRing

KEY = f"Authorization: Bearer {KeyRing.USER}\r\n".encode()
PATIENCE_S = 6.0
"""After which a connection counts as one that stays."""


class Quick(Wire):
    bounds = Bounds(head_s=0.5, rest_s=0.5, stall_s=1.0, connections=150, head_bytes=8192, headers=50)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with whole(tmp_path_factory.mktemp("slow"), verify=KeyRing().verify, wire=Quick) as gateway:
        yield gateway.server


def dribble(connection: socket.socket, data: bytes, every_s: float = 0.1, seconds: float = PATIENCE_S) -> bool:
    """Sends a byte now and then; whether the other side closed before the patience ended."""
    end = time.monotonic() + seconds
    for byte in data:
        if time.monotonic() > end:
            return False
        try:
            connection.sendall(bytes([byte]))
        except OSError:
            return True
        if said(connection, every_s)[1]:
            return True
    return said(connection, max(0.1, end - time.monotonic()))[1]


def slow_head(to: Address) -> bool:
    with connected(to) as connection:
        return dribble(connection, b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 1000)


def nothing_at_all(to: Address) -> bool:
    with connected(to) as connection:
        return said(connection, PATIENCE_S)[1]


def slow_second_head(to: Address) -> bool:
    with connected(to) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        received, _ = said(connection, 0.3)
        assert received.startswith(b"HTTP/1.1 200")
        return dribble(connection, b"GET /health HTTP/1.1\r\nX: " + b"y" * 1000)


def empty_lines(to: Address) -> bool:
    with connected(to) as connection:
        return dribble(connection, b"\r\n" * 500)


def rest_of_a_refused_body(to: Address) -> bool:
    with connected(to) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5000\r\n\r\n")
        received, _ = said(connection, 0.3)
        assert received.startswith(b"HTTP/1.1 401")
        return dribble(connection, b"x" * 1000)


def reads_nothing(to: Address, stream: bool) -> bool:
    """Asks for megabytes and leaves them where they are."""
    asked = json.dumps({"model": "echo", "prompt": ["x" * 2_000_000] * 2, "stream": stream}).encode()
    with connected(to, receive_bytes=4096) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n" + KEY + b"Content-Length: %d\r\n\r\n" % len(asked) + asked
        )
        connection.setblocking(False)
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            time.sleep(0.1)
            if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                return True  # reset: what was left is nobody's any more
        return False


CLIENTS: dict[str, Callable[[Address], bool]] = {
    "a head that dribbles": slow_head,
    "nothing at all": nothing_at_all,
    "a second head that dribbles": slow_second_head,
    "empty lines": empty_lines,
    "the rest of a refused body": rest_of_a_refused_body,
    "an answer that nobody reads": lambda to: reads_nothing(to, stream=False),
    "a stream that nobody reads": lambda to: reads_nothing(to, stream=True),
}


@pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS.keys())
def test_a_slow_client_is_let_go(quick: Server, client: Callable[[Address], bool]) -> None:
    assert client(address(quick.url))
    eventually(lambda: quick.models.open == 0)


def test_a_hundred_slow_clients_keep_nobody_waiting(quick: Server) -> None:
    with ExitStack() as stack, quick.http(key=None) as http:
        slow = [stack.enter_context(connected(address(quick.url))) for _ in range(100)]
        for connection in slow:
            connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert all(http.get("/health").status_code == 200 for _ in range(20))
        for connection in slow:
            received, closed = said(connection, 5)
            assert closed
            assert received.startswith(b"HTTP/1.1 408 ")
            assert b'"code":"request_timeout"' in received


@pytest.mark.parametrize(
    "head",
    [
        b"X: " + b"y" * 10_000,
        b"X: y\r\n" * 60,
        b"X" * 10_000 + b": y",
        b"".join(b"X-%d: %s\r\n" % (i, b"y" * 300) for i in range(40)),
    ],
    ids=["a value", "lines", "a name", "all together"],
)
def test_a_long_head_is_refused(quick: Server, head: bytes) -> None:
    received, closed = answer(address(quick.url), b"GET /health HTTP/1.1\r\nHost: a\r\n" + head + b"\r\n\r\n", 3)
    assert closed
    assert received.startswith(b"HTTP/1.1 431 ")
    assert b'"code":"headers_too_large"' in received
    assert b"x-request-id: req_" in received


def test_a_long_path_is_refused(quick: Server) -> None:
    received, closed = answer(address(quick.url), b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 3)
    assert (closed, received[:12]) == (True, b"HTTP/1.1 431")


def test_connections_are_counted(quick: Server) -> None:
    to = address(quick.url)
    with ExitStack() as stack:
        held = [stack.enter_context(connected(to)) for _ in range(Quick.bounds.connections)]
        received, closed = answer(to, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", 2)
        assert closed
        assert received[:12] in (b"", b"HTTP/1.1 503")  # reset before it was read, or read
        assert len(held) == Quick.bounds.connections
    eventually(lambda: answer(to, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")[0].startswith(b"HTTP/1.1 200"))


def test_a_refused_body_that_ends_keeps_its_connection(quick: Server) -> None:
    request = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
    with connected(address(quick.url)) as connection:
        for _ in range(3):
            connection.sendall(request + b"x" * 100_000)
            received, closed = said(connection, 0.4)
            assert received.startswith(b"HTTP/1.1 401 ")
            assert not closed


def test_a_stream_that_is_read_slowly_but_steadily_is_kept(quick: Server) -> None:
    asked = json.dumps({"model": "echo", "prompt": " ".join(["x" * 2000] * 1000), "stream": True}).encode()
    with connected(address(quick.url), receive_bytes=4096) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n" + KEY + b"Content-Length: %d\r\n\r\n" % len(asked) + asked
        )
        received, end = b"", time.monotonic() + 60
        while b"[DONE]" not in received[-200:] and time.monotonic() < end:
            data = connection.recv(1 << 15)
            assert data, "it was cut"
            received += data
            time.sleep(0.02)
    assert received.endswith(b"\r\n0\r\n\r\n")


def test_a_body_that_dribbles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "BODY_S", 0.5)
    with serving(wire=Quick) as server, connected(address(server.url)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n" + KEY + b"Content-Length: 5000\r\n\r\n")
        received = b""
        with contextlib.suppress(OSError):
            for _ in range(20):
                connection.sendall(b"x")
                time.sleep(0.1)
        received, closed = said(connection, 3)
    assert closed
    assert received[:12] in (b"HTTP/1.1 408", b"")


def test_a_websocket_is_refused(quick: Server) -> None:
    upgrade = b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    upgrade += b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    received, _ = answer(address(quick.url), b"GET /v1/models HTTP/1.1\r\nHost: a\r\n" + upgrade)
    assert received.startswith(b"HTTP/1.1 401 ")


def test_serve_listens_with_this_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve leaves the choice to uvicorn and asks for our middlewares before it makes the server."""
    import uvicorn

    monkeypatch.setattr(auto, "AutoHTTPProtocol", HttpToolsProtocol)
    front.middlewares()
    config = uvicorn.Config(lambda: None, factory=True, lifespan="off", log_config=None)
    config.load()
    assert config.http_protocol_class is wire.Wire
    assert GatewaySettings().max_body_bytes < 1 << 30


def test_uvicorns_own_protocol_lets_them_stay() -> None:
    with serving(wire=HttpToolsProtocol) as server:
        stays: dict[str, bool] = {}

        def tried(name: str) -> None:
            stays[name] = not CLIENTS[name](address(server.url))

        threads = [threading.Thread(target=tried, args=(name,)) for name in CLIENTS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert stays == dict.fromkeys(CLIENTS, True)
