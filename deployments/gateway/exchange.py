"""One call's notes: who asked, for what, and how it went. Stages of the gateway write them, the access log reads them.

The identifier is always made here. A client's own `x-request-id` is kept beside it and is never used for anything but logs.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from cluster import metrics
from cluster.tenancy.metered import Metered
from cluster.tenancy.metering import Later
from cluster.types import Chunk, Principal, Usage

logger = logging.getLogger(__name__)

KEY = "mmaas.exchange"
"""Where a request's Exchange lies in its ASGI scope."""

CLIENT_TEXT = 256
"""Characters of a client's string that may reach a log record."""


def new_request_id(now: float | None = None) -> str:
    """`req_` and 32 hexadecimal digits laid out as UUIDv7 (RFC 9562): 48 bits of milliseconds, then random bits; sorts by time."""
    milliseconds = int((time.time() if now is None else now) * 1000) & 0xFFFFFFFFFFFF
    random = secrets.randbits(74)
    value = milliseconds << 80 | 0x7 << 76 | (random >> 62) << 64 | 0b10 << 62 | random & (1 << 62) - 1
    return f"req_{value:032x}"


@dataclass(slots=True)
class Exchange:
    """Filled in on the way: `principal` by authentication, `model` by the route, `status` and times by the access log."""

    request_id: str = field(default_factory=new_request_id)
    client_request_id: str | None = None
    method: str = ""
    started: float = field(default_factory=time.perf_counter)
    principal: Principal | None = None
    model: str | None = None
    body: bytes = b""
    status: int = 0  # 499: the caller left before an answer
    error: str | None = None  # public code of what went wrong, also of a stream that broke after its 200
    bytes_out: int = 0
    first_token_s: float | None = None
    usage: Usage | None = None
    spoken: int = 0  # output tokens so far
    prompt_tokens: int = 0  # of the calls that the model has begun to answer
    cached_tokens: int = 0  # of these, what the prefix cache gave
    compute_us: int = 0  # of the model so far
    finish_reason: str | None = None  # of the choice that ended last
    on_words: Callable[[], None] | None = None  # hears that there is more of it
    on_end: Later | None = None  # settles the call, instead of the end of its work
    headers: dict[str, str] = field(default_factory=dict)  # of the answer, also of an error
    rows: int | None = None  # that a tabular model answered for

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started

    @property
    def tenant(self) -> str:
        return self.principal.tenant if self.principal else ""

    def heard(self, chunks: Iterable[Chunk] = ()) -> None:
        """The model said something."""
        if self.first_token_s is None:
            self.first_token_s = self.elapsed_s
        for chunk in chunks:
            if chunk.begun is not None:
                self.prompt_tokens += chunk.begun.prompt_tokens
                self.cached_tokens += chunk.begun.cached_tokens
            self.compute_us += chunk.compute_us
            for delta in chunk.deltas:
                self.spoken += len(delta.token_ids)
                self.finish_reason = delta.finish_reason or self.finish_reason
        if self.on_words is not None:
            self.on_words()

    @property
    def metered(self) -> Metered:
        """What the call has used, as far as it is known."""
        if self.usage is not None:
            return Metered.of(self.usage)
        if self.headers.get("x-cache") in ("hit", "shared"):
            return Metered(replayed_tokens=self.prompt_tokens + self.spoken)
        cached = min(self.cached_tokens, self.prompt_tokens)
        return Metered(
            input_tokens=self.prompt_tokens - cached,
            cached_tokens=cached,
            output_tokens=self.spoken,
            compute_seconds=self.compute_us,
        )

    def record(self, route: str | None) -> None:
        """Count and log the finished call. Only a model that answered becomes a label: others are a caller's words."""
        self.status = self.status or 499
        metrics.count_request(route, self.method, self.status, self.elapsed_s)
        if self.first_token_s is not None:
            metrics.FIRST_TOKEN.labels(self.model).observe(self.first_token_s)
        self.count_tokens()
        logger.info("request", extra={name: value for name, value in self._fields(route).items() if value is not None})

    def count_tokens(self) -> None:
        if self.usage is not None:
            metrics.TOKENS_IN.labels(self.model).inc(self.usage.prompt_tokens)
            metrics.TOKENS_OUT.labels(self.model).inc(self.usage.completion_tokens)
        if self.rows is not None:
            metrics.ROWS.labels(self.model).inc(self.rows)

    def _fields(self, route: str | None) -> dict[str, object]:
        return {
            "request_id": self.request_id,
            "client_request_id": self.client_request_id,
            "method": self.method,
            "route": route,
            "status": self.status,
            "error": self.error,
            "tenant": self.principal.tenant if self.principal else None,
            "key_id": self.principal.key_id if self.principal else None,
            "model": printable(self.model) if self.model else None,
            "prompt_tokens": self.usage.prompt_tokens if self.usage else None,
            "completion_tokens": self.usage.completion_tokens if self.usage else None,
            "from_cache": self.usage.from_cache or None if self.usage else None,
            "rows": self.rows,
            "first_token_ms": round(self.first_token_s * 1000, 3) if self.first_token_s is not None else None,
            "duration_ms": round(self.elapsed_s * 1000, 3),
            "bytes_out": self.bytes_out,
        }

    def answer_id(self, prefix: str) -> str:
        """The public identifier of the answer, traceable to the request: `chatcmpl-…`, `cmpl-…`."""
        return prefix + self.request_id.removeprefix("req_")


def of(scope: Any) -> Exchange:
    """The Exchange of a request that passed the first stage."""
    exchange: Exchange = scope[KEY]
    return exchange


def client_request_id(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The identifier that the caller gave, under the official API's name for it or the customary one."""
    sent = dict(headers)
    theirs = sent.get(b"x-client-request-id", sent.get(b"x-request-id", b""))
    return printable(theirs.decode("latin-1")) or None


def printable(text: str) -> str:
    """A client's string, fit for a log record: short, no control characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:CLIENT_TEXT])
