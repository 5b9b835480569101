"""The stages that refuse or remove: control headers, too many requests, malformed heads, unknown callers, long bodies.

Each knows only its own bound; `middleware.pipeline` says in which order they stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster import metrics
from cluster.errors import InvalidRequest, Overloaded, PayloadTooLarge
from deployments.gateway import exchange, limits
from deployments.gateway.errors import Misdirected
from deployments.gateway.keys import Keys, bearer, check_place
from deployments.gateway.protocols import is_open_inference
from deployments.gateway.stage import Stage

BODY_S = 30.0
"""Longest time for a body to arrive."""

CONTROL_HEADERS = frozenset(
    {
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve-multiplexed-model-id",
        b"x-session-id",
        b"x-request-id",
        b"x-client-request-id",
        b"x-ray-authorization",
    }
)
"""Headers by which Ray Serve lets a caller steer it, `_` written as `-`. Ours is the only hand on that wheel."""

CONTROL_PREFIXES = (b"x-serve-", b"x-ray-")


class Gate:
    """Counts the calls inside, over HTTP and handles together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.inside = 0

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Raises Overloaded when full."""
        if self.inside >= self.limit:
            raise Overloaded(f"The gateway works on {self.inside} requests already, its limit.", retry_after_s=1.0)
        self.inside += 1
        metrics.GATEWAY_INSIDE.set(self.inside)
        try:
            yield
        finally:
            self.inside -= 1
            metrics.GATEWAY_INSIDE.set(self.inside)


class DropControlHeaders(Stage):
    """Takes Serve's own control headers out of what a caller sent."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["headers"] = [(name, value) for name, value in scope["headers"] if not is_control(name)]
        await self.app(scope, receive, send)


def is_control(name: bytes) -> bool:
    name = name.lower().replace(b"_", b"-")
    return name in CONTROL_HEADERS or name.startswith(CONTROL_PREFIXES)


class Admission(Stage):
    """Refuses before any work when the gateway is full. Probes are always answered."""

    def __init__(self, app: ASGIApp, gate: Gate, public: frozenset[str]) -> None:
        super().__init__(app)
        self._gate, self._public = gate, public

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in self._public:
            await self.app(scope, receive, send)
        else:
            with self._gate.admit():
                await self.app(scope, receive, send)


class Limits(Stage):
    """What the head alone tells: exactly one Host, one of ours, no encoded body but under /v2, no body that announces itself as too
    long."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, hosts: frozenset[str]) -> None:
        """`hosts`: our names, none for any."""
        super().__init__(app)
        self._max_body_bytes, self._hosts = max_body_bytes, hosts

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = [name for name, _ in scope["headers"]]
        headers = dict(scope["headers"])
        if names.count(b"host") != 1:
            raise InvalidRequest(f"A request needs exactly one Host header, not {names.count(b'host')}.")
        if self._hosts and host_name(headers[b"host"]) not in self._hosts:
            raise Misdirected("There is no such host here.")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity" and not is_open_inference(scope["path"]):
            raise InvalidRequest("An encoded body is not accepted: send it without Content-Encoding.")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18:
            raise InvalidRequest("Content-Length is not a number.")
        if int(length) > self._max_body_bytes:
            raise PayloadTooLarge(f"The body of {int(length)} bytes is longer than {self._max_body_bytes}.")
        await self.app(scope, receive, send)


def host_name(value: bytes) -> str:
    """The name of a Host header, without its port."""
    name, colon, port = value.decode("latin-1").lower().rpartition(":")
    return name if colon and (port.isdigit() or not port) else value.decode("latin-1").lower()


class Authenticate(Stage):
    """Puts the principal into the Exchange. Everything but the public paths needs a key, routes that don't exist included."""

    def __init__(self, app: ASGIApp, keys: Keys, public: frozenset[str]) -> None:
        super().__init__(app)
        self._keys, self._public = keys, public

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in self._public:
            principal = await self._keys.principal(bearer(scope["headers"]))
            check_place(scope["headers"], principal)
            exchange.of(scope).principal = principal
        await self.app(scope, receive, send)


class Body(Stage):
    """Reads the body, of known callers only, and counts the bytes that really come."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        super().__init__(app)
        self._max_body_bytes = max_body_bytes

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange.of(scope).body = await limits.read_body(receive, self._max_body_bytes, BODY_S)
        await self.app(scope, receive, send)
