"""One tree of errors for the whole platform.

Every error knows its HTTP status, its public code and, where it helps, how long to wait. Errors cross process boundaries, so each
one is rebuilt from its own attributes when unpickled. To add one: subclass `PlatformError`, set the class attributes and write one
sentence that says when it is raised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class PlatformError(Exception):
    """Base of everything the platform raises on purpose; raised itself only for a fault of ours (a 500 without details)."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.public_code = code or self.code
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.__class__, self.message, self.param, self.public_code, self.retry_after_s)


def _rebuild(
    kind: type[PlatformError], message: str, param: str | None, code: str | None, retry_after_s: float | None
) -> PlatformError:
    return kind(message, param=param, code=code, retry_after_s=retry_after_s)


class InvalidRequest(PlatformError):
    """Raised when what the caller sent can't be accepted; `param` names the field."""

    status = 400
    code = "invalid_value"
    type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    """Raised when prompt and requested output don't fit the model's context window."""

    code = "context_length_exceeded"


class ModelNotSupported(InvalidRequest):
    """Raised when a served model is asked for what its kind doesn't do; the message says which call is right."""

    code = "model_not_supported"


class Unauthenticated(InvalidRequest):
    """Raised when a call carries no key, or one that is unknown, revoked or expired."""

    status = 401
    code = "invalid_api_key"


class Forbidden(InvalidRequest):
    """Raised when a valid key lacks the scope that a route declares."""

    status = 403
    code = "insufficient_permissions"


class NotFound(InvalidRequest):
    """Raised when no such thing exists for this tenant."""

    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """Raised when no served model has that name."""

    code = "model_not_found"


class Conflict(InvalidRequest):
    """Raised when the state of a thing forbids the change that was asked for."""

    status = 409
    code = "conflict"


class BudgetExceeded(PlatformError):
    """Raised before any work when what a request may cost could pass a budget, with all that is reserved already."""

    status = 429
    code = "insufficient_quota"
    type = "insufficient_quota"


class InProgress(InvalidRequest):
    """Raised when a request with the same idempotency key is still being worked on: come back for its answer."""

    status = 409
    code = "idempotency_in_progress"


class KeyReused(InvalidRequest):
    """Raised when an idempotency key comes back with another request than it was first used for."""

    status = 422
    code = "idempotency_key_reused"


class PayloadTooLarge(InvalidRequest):
    """Raised when a body is longer than the gateway accepts."""

    status = 413
    code = "payload_too_large"


class RateLimited(PlatformError):
    """Raised when a project, a model or a key has used up what it may in a minute; `retry_after_s` says when to come back."""

    status = 429
    code = "rate_limit_exceeded"
    type = "rate_limit_error"
    headers: Mapping[str, str] = {}  # what is left, in the process that counted; they don't travel


class Overloaded(PlatformError):
    """Raised when a queue is full; `retry_after_s` says when to come back."""

    status = 503
    code = "overloaded"


class LedgerUnavailable(PlatformError):
    """Raised when what a request costs can't be written down now; nothing that costs is begun then."""

    status = 503
    code = "billing_unavailable"


class Unavailable(PlatformError):
    """Raised when a model is deployed but no replica of it can answer now."""

    status = 503
    code = "model_unavailable"


class ReplicaLost(Unavailable):
    """Raised when the shard group that was working on a request died."""

    code = "replica_lost"


class ModelError(PlatformError):
    """Raised when the model itself has no answer to a request: its numbers aren't finite, or no token is allowed."""

    status = 500
    code = "model_error"


class DeadlineExceeded(PlatformError):
    """Raised when a request ran longer than it may."""

    status = 504
    code = "deadline_exceeded"


class ModelNotServable(InvalidRequest):
    """Raised before any actor starts, when a model directory can't be served as asked; the message says what to change."""

    code = "model_not_servable"


class SettingsError(InvalidRequest):
    """Raised at start-up for settings that are unknown, out of range or contradict each other."""

    code = "invalid_settings"


class StorageError(PlatformError):
    """Raised when stored files are missing, torn or don't match their manifest."""

    code = "storage_error"


class PlacementError(PlatformError):
    """Raised when the cluster has no room for what was asked; the message says what waits for what."""

    status = 503
    code = "no_capacity"
