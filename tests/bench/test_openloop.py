"""The generator against a real server that is slow, breaks off or refuses, and its reading of what came."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.openloop import Exchange, body, events, problem, request_bytes, send_all

ROOT = Path(__file__).parents[2]
SLOW_S = 0.5


class Server(BaseHTTPRequestHandler):
    """Streams `max_tokens` events in chunks; the model's name says what goes wrong."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.came.append(time.monotonic())  # type: ignore[attr-defined]
        assert self.headers["Authorization"] == "Bearer key"
        self.send_response(503 if asked["model"] == "full" else 200)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        self._chunk(b": hello\n\n")
        time.sleep({"slow": SLOW_S, "stuck": 60}.get(asked["model"], 0))
        for number in range(asked["max_tokens"]):
            self._event({"choices": [{"text": "a" * (number > 0), "finish_reason": None}], "usage": None})
        if asked["model"] == "breaks":
            self._event({"error": {"message": "a shard died"}})
        elif asked["model"] != "cut":
            self._event({"choices": [], "usage": {"completion_tokens": asked["max_tokens"]}})
            self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")
        self.close_connection = True

    def _event(self, content: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps(content)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    running.daemon_threads, running.block_on_close = True, False
    running.came = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def sent(server: ThreadingHTTPServer, models: list[str], *, every_s: float = 0.01, patience_s: float = 30) -> dict[str, Any]:
    requests = [{"at_s": number * every_s, "body": {"model": model, "max_tokens": 3}} for number, model in enumerate(models)]
    where = {"host": "127.0.0.1", "port": server.server_port, "headers": {"Authorization": "Bearer key"}}
    work = json.dumps(where | {"patience_s": patience_s, "requests": requests})
    words = [sys.executable, "-m", "bench.openloop"]
    done = subprocess.run(words, input=work, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_nobody_waits_for_an_answer_before_asking(server: ThreadingHTTPServer) -> None:
    answer = sent(server, ["slow"] * 20)
    came = server.came  # type: ignore[attr-defined]
    assert len(came) == 20
    assert max(came) - min(came) < 20 * SLOW_S / 2
    assert all(e["first_s"] >= SLOW_S and not e["error"] for e in answer["exchanges"])


def test_a_whole_answer_has_times_and_tokens(server: ThreadingHTTPServer) -> None:
    (exchange,) = sent(server, ["s"])["exchanges"]
    assert exchange["num_tokens"] == 3
    assert exchange["error"] == ""
    assert 0 < exchange["first_s"] <= exchange["last_s"]


def test_what_goes_wrong_is_named(server: ThreadingHTTPServer) -> None:
    answer = sent(server, ["full", "breaks", "cut", "s"])
    errors = [exchange["error"] for exchange in answer["exchanges"]]
    assert errors[0].endswith("503 Service Unavailable")
    assert "a shard died" in errors[1]
    assert errors[2:] == ["the answer broke off", ""]


def test_patience_ends(server: ThreadingHTTPServer) -> None:
    answer = sent(server, ["s", "stuck"], patience_s=1)
    assert [exchange["error"] for exchange in answer["exchanges"]] == ["", "the answer broke off"]


def test_without_a_server_nothing_came() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as closed:
        pass
    (exchange,) = sent(closed, ["s"])["exchanges"]
    assert "Connect call failed" in exchange["error"]


CONTENT = b"".join(b"data: %d\n\n: comment\n\n" % number for number in range(5)) + b"data: [DONE]\n\n"


@given(cuts=st.lists(st.integers(0, 400), max_size=12), sizes=st.lists(st.integers(1, 20), min_size=1), is_chunked=st.booleans())
def test_however_bytes_come_the_events_are_the_same(cuts: list[int], sizes: list[int], is_chunked: bool) -> None:
    stream = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(sizes)
        if is_chunked
        else b"HTTP/1.1 200 OK\r\n\r\n" + CONTENT
    )
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    pieces = [(float(end), stream[start:end]) for start, end in pairwise(places)]
    found = list(events(pieces))
    assert [data for _, data in found] == [b"0", b"1", b"2", b"3", b"4", b"[DONE]"]
    assert b"".join(data for _, data in body(pieces)) == CONTENT
    assert [at for at, _ in found] == sorted(at for at, _ in found)


def chunked(sizes: list[int]) -> bytes:
    framed, rest, number = b"", CONTENT, 0
    while rest:
        size = sizes[number % len(sizes)]
        framed += b"%x\r\n%b\r\n" % (len(rest[:size]), rest[:size])
        rest, number = rest[size:], number + 1
    return framed + b"0\r\n\r\n"


def test_an_event_has_the_moment_of_its_end() -> None:
    pieces = [(1.0, b"HTTP/1.1 200 OK\r\n\r\ndata: 0\n"), (2.0, b"\ndata: 1\n\nda"), (3.0, b"ta: 2\n\n")]
    assert list(events(pieces)) == [(2.0, b"0"), (2.0, b"1"), (3.0, b"2")]


def test_an_answer_that_is_not_whole_says_what_is_known() -> None:
    assert problem([], is_done=False) == "nothing came"
    ok, busy = [(1.0, b"HTTP/1.1 200 OK\r\n\r\n")], [(1.0, b"HTTP/1.1 503 Busy\r\n\r\n")]
    assert problem(ok, is_done=False) == "the answer broke off"
    assert problem(ok, is_done=True) == ""
    assert problem(busy, is_done=True) == "HTTP/1.1 503 Busy"


PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
IN_CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"


async def kept(answers: list[bytes], at: list[float], *, closes: bool = False) -> tuple[list[Exchange], int]:
    """Exchanges over kept connections, and how many connections it took. The server answers in turn, then hangs up or not."""
    opened, left = 0, iter(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        with contextlib.suppress(asyncio.IncompleteReadError, StopIteration):
            while True:
                await reader.readuntil(b"{}")
                writer.write(next(left))
                if closes:
                    break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    request = request_bytes("127.0.0.1", {}, {}, keep=True)
    exchanges = await send_all("127.0.0.1", port, [(when, request) for when in at], 5, keep=True)
    server.close()
    return exchanges, opened


async def test_kept_connections_take_one_request_after_another() -> None:
    exchanges, opened = await kept([PLAIN, IN_CHUNKS, PLAIN], [0.0, 0.1, 0.2])
    assert [b"".join(data for _, data in body(exchange.pieces)) for exchange in exchanges] == [b"ok"] * 3
    assert [exchange.failure for exchange in exchanges] == [""] * 3
    assert opened == 1


async def test_requests_at_once_have_connections_of_their_own() -> None:
    exchanges, opened = await kept([PLAIN[:-1], PLAIN, b"k"], [0.0, 0.1])
    assert opened == 2
    assert [exchange.closed.is_set() for exchange in exchanges] == [False, True]


async def test_a_connection_that_ends_amid_an_answer_is_a_failure_and_an_idle_one_is_not() -> None:
    exchanges, opened = await kept([PLAIN, PLAIN[:-1]], [0.0, 0.1], closes=True)
    assert [exchange.failure for exchange in exchanges] == ["", "the connection was closed"]
    assert opened == 2
