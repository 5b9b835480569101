"""Errors as callers see them: the OpenAI envelope with all four keys, and the headers that steer a client's retries.

Everything that isn't a `PlatformError` is a fault of ours: the caller learns the request's identifier and nothing else.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pydantic
from starlette.exceptions import HTTPException

from cluster.errors import BudgetExceeded, Conflict, InvalidRequest, ModelError, NotFound, PayloadTooLarge, PlatformError
from deployments.gateway.protocols import is_open_inference

_BY_PYDANTIC = {"missing": "missing_required_parameter", "finite_number": "invalid_value"}
_STATUS_TEXT = {404: "there is no such route", 405: "this route does not answer that method"}


class MethodNotAllowed(InvalidRequest):
    """Raised when a route exists, but not for that method."""

    status = 405
    code = "method_not_allowed"


class RequestTooSlow(InvalidRequest):
    """Raised when a request doesn't arrive in time. 408, so that nobody takes it for a slow model."""

    status = 408
    code = "request_timeout"


class Misdirected(InvalidRequest):
    """Raised when a request is for a name that isn't ours."""

    status = 421
    code = "misdirected_request"


class HeadTooLong(InvalidRequest):
    """Raised when a request's line and headers are more than anybody needs."""

    status = 431
    code = "headers_too_large"


class ClientGone(Exception):
    """Raised inside the gateway when the caller hung up: there is nobody left to answer."""


def public(error: BaseException, request_id: str) -> PlatformError:
    """What a caller may know about `error`: a status-500 error keeps its code and loses its words, unless the model made it."""
    if isinstance(error, PlatformError) and (error.status != 500 or isinstance(error, ModelError)):
        return error
    code = error.public_code if isinstance(error, PlatformError) else None
    return PlatformError(f"The server failed on this request. Please quote {request_id} when you report it.", code=code)


def envelope(error: PlatformError) -> dict[str, Any]:
    """The body of every answer that isn't a success (OpenAPI specification, schema ErrorResponse)."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.public_code}}


def encode(error: PlatformError, path: str = "") -> bytes:
    """The body in the form of the protocol that a path belongs to: the Open Inference Protocol's is one string."""
    return msgspec.json.encode({"error": error.message} if is_open_inference(path) else envelope(error))


def retry_headers(error: PlatformError) -> list[tuple[bytes, bytes]]:
    """`Retry-After` in whole seconds; `x-should-retry: false` where a repeated call can only fail again.

    The official clients retry 409 by themselves, and obey a Retry-After only up to 120 s.
    """
    headers = []
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode()))
    if isinstance(error, (Conflict, ModelError, BudgetExceeded)):
        headers.append((b"x-should-retry", b"false"))
    return headers


def from_http(error: HTTPException) -> PlatformError:
    """Starlette's own refusals (no route, wrong method) in our vocabulary."""
    message = _STATUS_TEXT.get(error.status_code, "the request can't be answered")
    kinds: dict[int, type[PlatformError]] = {404: NotFound, 405: MethodNotAllowed, 413: PayloadTooLarge}
    return kinds.get(error.status_code, InvalidRequest if error.status_code < 500 else PlatformError)(message)


def from_validation(error: pydantic.ValidationError) -> InvalidRequest:
    """The first problem of a body, with the field's path as `param`. The offending value is never repeated."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = path(problem["loc"])
    return InvalidRequest(f"Invalid {param or 'body'}: {problem['msg']}.", param=param or None, code=_code(problem["type"]))


def path(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "content")` as the official API writes it: `messages[0].content`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


def _code(kind: str) -> str:
    if kind in _BY_PYDANTIC:
        return _BY_PYDANTIC[kind]
    if kind.endswith("_type") or kind.startswith("invalid_type"):
        return "invalid_type"
    return "invalid_value"
