"""Two ways to the gateway, one contract: an operation and a JSON body go out, JSON objects or a `PlatformError` come back.

Knows the wire, not the shape of answers. Closing a stream, or dropping it, ends the work behind it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any, Protocol

import httpx
import msgspec

from cluster import errors
from cluster.errors import PlatformError, Unavailable

PATHS = {
    "chat.completions": "/v1/chat/completions",
    "completions": "/v1/completions",
    "embeddings": "/v1/embeddings",
    "rerank": "/v1/rerank",
    "classify": "/v1/classify",
    "models.list": "/v1/models",
}


Answers = Generator[Any, None, None]


class Transport(Protocol):
    def send(self, operation: str, body: Mapping[str, Any]) -> Answers:
        """One object for a plain answer, one for each chunk of a streamed one. Raises PlatformError."""
        ...

    def close(self) -> None: ...


class HttpTransport:
    """The gateway's HTTP API. Not retried: a caller knows better whether a repeated generation is worth it."""

    def __init__(self, base_url: str, api_key: str, timeout_s: float) -> None:
        headers = {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=base_url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=timeout_s)

    def send(self, operation: str, body: Mapping[str, Any]) -> Answers:
        try:
            with self._open(operation, body) as answer:
                if answer.status_code >= 400:
                    raise from_envelope(answer.status_code, answer.read(), answer.headers.get("retry-after"))
                if answer.headers.get("content-type", "").startswith("text/event-stream"):
                    yield from events(answer.iter_lines())
                else:
                    yield msgspec.json.decode(answer.read())
        except httpx.TransportError as error:
            raise Unavailable(f"the gateway can't be reached: {error}") from error

    def _open(self, operation: str, body: Mapping[str, Any]) -> Any:
        if operation == "models.retrieve":
            return self._http.stream("GET", f"/v1/models/{body['model']}")
        if operation == "models.list":
            return self._http.stream("GET", PATHS[operation])
        return self._http.stream("POST", PATHS[operation], json=body)

    def close(self) -> None:
        self._http.close()


class HandleTransport:
    """The gateway's Serve handle, from any job on the cluster. Not to be used inside a running event loop (Ray forbids it)."""

    def __init__(self, handle: Any, api_key: str) -> None:
        self._call = handle.options(method_name="call", stream=True)
        self._api_key = api_key

    def send(self, operation: str, body: Mapping[str, Any]) -> Answers:
        from deployments.handles import platform_error

        answer = self._call.remote(self._api_key, operation, dict(body))
        try:
            yield from answer
        except Exception as error:
            raise platform_error(error, "gateway") from error
        finally:
            answer.cancel()

    def close(self) -> None:
        """A handle holds nothing."""


def events(lines: Iterator[str]) -> Iterator[Any]:
    """The JSON of each `data:` line up to `[DONE]`. Raises what an error event says, and ReplicaLost for a stream cut short."""
    for line in lines:
        if not line.startswith("data:"):
            continue  # a comment, or the empty line between events
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = msgspec.json.decode(data)
        if event.get("error"):
            raise from_error(500, event["error"])
        yield event
    raise errors.ReplicaLost("the stream ended before its end")


def from_envelope(status: int, raw: bytes, retry_after: str | None = None) -> PlatformError:
    """The error that the gateway rendered; what is no envelope (a proxy's page) is told by its status."""
    try:
        body = msgspec.json.decode(raw)["error"]
        return from_error(status, dict(body), float(retry_after) if retry_after else None)
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        return _kind(None, status)(f"HTTP status {status}")


def from_error(status: int, body: dict[str, Any], retry_after_s: float | None = None) -> PlatformError:
    code = body.get("code")
    return _kind(code, status)(str(body.get("message")), param=body.get("param"), code=code, retry_after_s=retry_after_s)


def _kind(code: str | None, status: int) -> type[PlatformError]:
    """The class with this code; else the first one with this status, so that a new code still is a known kind of trouble."""
    kinds = list(_all(PlatformError))
    same_code = (kind for kind in kinds if kind.code == code)
    same_status = (kind for kind in kinds if kind.status == status)
    return next(same_code, next(same_status, errors.InvalidRequest if 400 <= status < 500 else PlatformError))


def _all(kind: type[PlatformError]) -> Iterator[type[PlatformError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _all(child)
