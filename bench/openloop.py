"""Sends requests when their time has come, whether or not others are answered; a process of its own: `python -m bench.openloop`.

Who waits for answers before it asks again slows down with the server and hides its delays. Here every request has its moment, and
its times count from that moment. While it runs, this process only notes when bytes came; it reads what they say afterwards, so that
it takes little from a server on the same machine. How much, and how late it was, is in what it answers:

    in   {"host", "port", "headers": {...}, "patience_s", "requests": [{"at_s", "body": {...}}]}
    out  {"exchanges": [{"first_s", "last_s", "num_tokens", "error"}], "cpu_s", "late_s"}

The bodies are those of `POST /v1/completions` with a stream and its usage (OpenAI's API). Times count from when a request was due.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httptools

LEAD_S = 0.2
"""Before the first request is due, so that the loop is running by then."""

Piece = tuple[float, bytes]
"""When bytes came, and they."""


@dataclass(eq=False)
class Exchange(asyncio.Protocol):
    """One request on a connection of its own. Times are `time.perf_counter`'s."""

    request: bytes
    due: float
    sent: float = 0.0
    pieces: list[Piece] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    failure: str = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        self.failure = str(error or "")
        self.closed.set()


class Kept(asyncio.Protocol):
    """A connection for one request after another: it lies among `idle` while it has none. Only looks where an answer ends."""

    def __init__(self, idle: list[Kept]) -> None:
        self._idle = idle
        self._exchange: Exchange | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def ask(self, exchange: Exchange) -> None:
        self._exchange, self._parser = exchange, httptools.HttpResponseParser(self)
        self._transport.write(exchange.request)

    def data_received(self, data: bytes) -> None:
        if self._exchange is not None:
            self._exchange.pieces.append((time.perf_counter(), data))
            self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        assert self._exchange is not None
        if self._parser.should_keep_alive():
            self._idle.append(self)
        self._exchange.closed.set()
        self._exchange = None

    def connection_lost(self, error: Exception | None) -> None:
        if self in self._idle:
            self._idle.remove(self)
        if self._exchange is not None:
            self._exchange.failure = str(error or "the connection was closed")
            self._exchange.closed.set()


async def send_all(
    host: str, port: int, requests: Sequence[tuple[float, bytes]], patience_s: float, *, keep: bool = False
) -> list[Exchange]:
    """Each at its time in seconds from now. Those not answered `patience_s` after the last one was due are given up.

    `keep`: over connections that stay open for the next request, as official clients have them; the requests must allow it.
    """
    start, idle = time.perf_counter() + LEAD_S, list[Kept]()
    exchanges = [Exchange(request, start + at_s) for at_s, request in requests]
    with suppress(TimeoutError):
        async with asyncio.timeout(LEAD_S + requests[-1][0] + patience_s):
            await asyncio.gather(*(_send(host, port, exchange, idle if keep else None) for exchange in exchanges))
    return exchanges


async def _send(host: str, port: int, exchange: Exchange, idle: list[Kept] | None) -> None:
    await asyncio.sleep(exchange.due - time.perf_counter())
    exchange.sent = time.perf_counter()
    try:
        if idle is None:
            await asyncio.get_running_loop().create_connection(lambda: exchange, host, port)
        elif idle:
            idle.pop().ask(exchange)
        else:
            _, connection = await asyncio.get_running_loop().create_connection(lambda: Kept(idle), host, port)
            connection.ask(exchange)
        await exchange.closed.wait()
    except OSError as error:
        exchange.failure = str(error)


def request_bytes(host: str, headers: Mapping[str, str], body: Mapping[str, Any], *, keep: bool = False) -> bytes:
    content = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", f"Host: {host}", "Content-Type: application/json"]
    lines += [] if keep else ["Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()] + [f"Content-Length: {len(content)}"]
    return "\r\n".join([*lines, "", ""]).encode() + content


def outcome(exchange: Exchange) -> dict[str, Any]:
    """What a caller had of it; `error` is empty for a whole answer."""
    first = last = None
    num_tokens, error, is_done = 0, exchange.failure, False
    for at, event in events(exchange.pieces):
        if event == b"[DONE]":
            is_done = True
            continue
        content = json.loads(event)
        if "error" in content:
            error = json.dumps(content["error"])[:200]
        num_tokens = (content.get("usage") or {}).get("completion_tokens", num_tokens)
        for choice in content.get("choices", ()):
            last = at - exchange.due
            if choice["text"] or choice.get("finish_reason"):
                first = last if first is None else first
    error = error or problem(exchange.pieces, is_done=is_done)
    return {"first_s": first, "last_s": last, "num_tokens": num_tokens, "error": error}


def events(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The data of every server-sent event, with the moment at which its end came."""
    buffer = b""
    for at, content in body(pieces):
        buffer += content
        *whole, buffer = buffer.split(b"\n\n")
        for event in whole:
            if event.startswith(b"data: "):
                yield at, event.removeprefix(b"data: ")


def body(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """What came after the head of the answer, without the frames of the chunked transfer coding (RFC 9112, section 7.1)."""
    buffer, is_chunked, missing, in_body = b"", False, 0, False
    for at, data in pieces:
        buffer += data
        if not in_body:
            head, found, rest = buffer.partition(b"\r\n\r\n")
            if not found:
                continue
            in_body, is_chunked, buffer = True, b"transfer-encoding: chunked" in head.lower(), rest
        if not is_chunked:
            yield at, buffer
            buffer = b""
            continue
        while buffer:
            if not missing:
                size, found, rest = buffer.lstrip(b"\r\n").partition(b"\r\n")
                if not found:
                    break
                buffer, missing = rest, int(size.partition(b";")[0], 16)
                if not missing:
                    return
            yield at, buffer[:missing]
            missing, buffer = missing - len(buffer[:missing]), buffer[missing:]


def problem(pieces: Sequence[Piece], *, is_done: bool) -> str:
    """Why there is no whole answer; empty if there is one."""
    status = b"".join(data for _, data in pieces).partition(b"\r\n")[0].decode(errors="replace")
    if " 200 " in status:
        return "" if is_done else "the answer broke off"
    return status or "nothing came"


def main() -> None:
    work = json.load(sys.stdin)
    requests = [(one["at_s"], request_bytes(work["host"], work["headers"], one["body"])) for one in work["requests"]]
    gc.freeze()
    gc.disable()
    before = resource.getrusage(resource.RUSAGE_SELF)
    exchanges = asyncio.run(send_all(work["host"], work["port"], requests, work["patience_s"]))
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    late_s = max((exchange.sent - exchange.due for exchange in exchanges if exchange.sent), default=0.0)
    print(json.dumps({"exchanges": [outcome(exchange) for exchange in exchanges], "cpu_s": cpu_s, "late_s": late_s}))


if __name__ == "__main__":
    main()
