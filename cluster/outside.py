"""One HTTP request as a stranger sends it: no library in between that would mend it, no proxy, no key unless one is given."""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass

TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """Names of headers are in lower case. Status 0: nothing answered, or it was not HTTP."""

    status: int
    headers: Mapping[str, str]
    body: str


NOTHING = Answer(0, {}, "")


@dataclass(frozen=True, slots=True)
class Door:
    """An address that somebody may knock at."""

    host: str
    port: int

    def ask(self, method: str, path: str, headers: Mapping[str, str] | None = None, body: str = "") -> Answer:
        """A request with one Host header, which `headers` may replace."""
        lines = {"Host": f"{self.host}:{self.port}", **(headers or {}), "Content-Length": str(len(body.encode()))}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return self.say(f"{method} {path} HTTP/1.1\r\n{head}Connection: close\r\n\r\n{body}".encode())

    def say(self, raw: bytes) -> Answer:
        """Any bytes, and the first answer to them."""
        received = b""
        try:
            with socket.create_connection((self.host, self.port), TIMEOUT_S) as connection:
                connection.sendall(raw)
                while (data := connection.recv(1 << 16)) and len(received) < 1 << 22:
                    received += data
        except OSError:
            pass  # what came before counts
        return _read(received)

    def is_open(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), TIMEOUT_S):
            return True
        return False

    def speaks_tls(self) -> bool:
        """Whether a TLS handshake succeeds; whose certificate it is, is not looked at."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            with socket.create_connection((self.host, self.port), TIMEOUT_S) as plain, context.wrap_socket(plain):
                return True
        except OSError:
            return False


class _Received(io.BytesIO):
    """What `http.client` takes for a socket."""

    def makefile(self, *_: object) -> _Received:
        return self


def _read(received: bytes) -> Answer:
    if not received:
        return NOTHING
    try:
        response = http.client.HTTPResponse(_Received(received))  # type: ignore[arg-type]
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, response.read().decode(errors="replace"))
    except (http.client.HTTPException, OSError, ValueError):
        return NOTHING
