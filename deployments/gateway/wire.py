"""The HTTP/1.1 that we speak on a socket: uvicorn's httptools protocol, with an end to everything that a client can draw out.

uvicorn bounds neither the bytes of a head nor the time that it takes, nor a body that goes on after its answer, nor an answer that
nobody reads. HAProxy bounds heads in front of us; this bounds the rest, and everything where there is no HAProxy. It knows bytes
and clocks, nothing of keys or models. `install` puts it in the place of uvicorn's own choice, in every process where Serve is to
listen: Serve makes its uvicorn itself and offers no way to name a protocol. httptools is a must, for uvicorn's other parser takes
requests with two lengths.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http import auto
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from cluster.errors import InvalidRequest, Overloaded, PlatformError
from deployments.gateway import errors
from deployments.gateway.errors import HeadTooLong, RequestTooSlow
from deployments.gateway.exchange import new_request_id
from deployments.gateway.security_headers import ALWAYS


@dataclass(frozen=True)
class Bounds:
    """What one client may take. Times are seconds."""

    head_bytes: int = 32 << 10
    headers: int = 100
    head_s: float = 10.0
    """From the connection, or the first byte of a further request, to the end of its head."""
    rest_s: float = 5.0
    """For what is left of a body when its answer is out."""
    stall_s: float = 30.0
    """Without a byte of the answer leaving."""
    connections: int = 4096
    """Open at once in one process."""


class Wire(HttpToolsProtocol):
    """One connection. `bounds` belongs to the class, for uvicorn makes the instances."""

    bounds: ClassVar[Bounds] = Bounds()

    def __init__(self, config: Any, server_state: Any, *rest: Any, **more: Any) -> None:
        super().__init__(config, server_state, *rest, **more)
        self.ws_protocol_class = None  # there are no WebSockets here, so nobody gets past the stages by one
        for headers in (config.encoded_headers, server_state.default_headers):
            headers[:] = [(name, value) for name, value in headers if name.lower() != b"server"]
        self._in_head = True  # no request has begun, or its head is not complete
        self._waiting_bytes = 0  # came since the last head ended
        self._head_size = self._head_lines = 0
        self._problem: PlatformError | None = None
        self._clock: asyncio.TimerHandle | None = None  # of the head, or of the rest of a body
        self._watch: asyncio.TimerHandle | None = None
        self._unread = 0  # bytes that waited to be written when last looked at
        self._moved = False  # whether some left since

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch = self.loop.call_later(self.bounds.stall_s / 2, self._look)
        if len(self.connections) > self.bounds.connections:
            self._refuse(Overloaded("The gateway has no more room for connections.", retry_after_s=1.0))
        else:
            self._wait(self.bounds.head_s, self._head_late)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._stop_waiting()
        if self._watch is not None:
            self._watch.cancel()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head:
            self._waiting_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing() or not self._in_head:
            return
        if self._waiting_bytes > self.bounds.head_bytes:
            self._refuse(HeadTooLong(f"The head of a request is longer than {self.bounds.head_bytes} bytes."))
        elif self._clock is None and self._waiting_bytes:
            self._wait(self.bounds.head_s, self._head_late)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_size = self._head_lines = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))
        if not self.url.startswith(b"/"):
            self._fail(InvalidRequest("The request's target must be a path."))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._head_lines += 1
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self._in_head, self._waiting_bytes = False, 0
        self._stop_waiting()
        names = [name for name, _ in self.headers]
        if names.count(b"content-length") + names.count(b"transfer-encoding") > 1:
            self._fail(InvalidRequest("A request has one length: one Content-Length, or one Transfer-Encoding."))
        if b"transfer-encoding" in names and self.parser.get_http_version() == "1.0":
            self._fail(InvalidRequest("HTTP/1.0 has no Transfer-Encoding."))
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True
        if self.cycle.response_complete:  # the rest of a body whose answer was out before it
            self._stop_waiting()
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._in_head and not self.pipeline and not self.transport.is_closing():
            self._wait(self.bounds.rest_s, self.transport.close)

    def resume_writing(self) -> None:
        self._moved = True
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what the parser, or a bound of ours in one of its calls, refused."""
        self._refuse(self._problem or InvalidRequest("The request is not valid HTTP/1.1."))

    def _count(self, size: int) -> None:
        self._head_size += size
        if self._head_size > self.bounds.head_bytes or self._head_lines > self.bounds.headers:
            allowed = f"{self.bounds.head_bytes} bytes or {self.bounds.headers} headers"
            self._fail(HeadTooLong(f"The head of a request is longer than {allowed}."))

    def _fail(self, problem: PlatformError) -> None:
        """Out of one of the parser's calls, which turns what is raised into an error of its own."""
        self._problem = problem
        raise httptools.HttpParserError

    def _head_late(self) -> None:
        self._clock = None
        if self._answering:
            self._wait(self.bounds.head_s, self._head_late)
        elif self._waiting_bytes:
            self._refuse(RequestTooSlow(f"The head of a request did not arrive within {self.bounds.head_s:g} s."))
        else:
            self.transport.close()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, error: PlatformError) -> None:
        """Answer and close; an answer that is on its way is cut instead, for nothing may be put into it."""
        self._stop_waiting()
        if not self._answering:
            body = errors.encode(error)
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
                (b"x-request-id", new_request_id().encode()),
                *errors.retry_headers(error),
                *ALWAYS,
            ]
            lines = [b"%s: %s\r\n" % header for header in headers]
            self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body]))
        self.transport.close()

    def _wait(self, seconds: float, then: Any) -> None:
        self._stop_waiting()
        self._clock = self.loop.call_later(seconds, then)

    def _stop_waiting(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _look(self) -> None:
        """Ends a connection whose other side reads nothing, also one that is being closed and still has something to say."""
        waiting = self.transport.get_write_buffer_size()
        if self._unread and waiting >= self._unread and not self._moved:
            self._reset()
            return
        self._unread, self._moved = waiting, False
        self._watch = self.loop.call_later(self.bounds.stall_s / 2, self._look)

    def _reset(self) -> None:
        """Close at once; the kernel, too, forgets what it was still to send."""
        opened = self.transport.get_extra_info("socket")
        if opened is not None and opened.family in (socket.AF_INET, socket.AF_INET6):
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


def install() -> None:
    """Make every uvicorn of this process that chooses its protocol itself choose ours."""
    auto.AutoHTTPProtocol = Wire
