"""What failures of handle calls mean. The calls themselves are in test_router.py and test_serve.py."""

from __future__ import annotations

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError, TaskCancelledError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from cluster.errors import ContextLengthExceeded, Overloaded, PlatformError, ReplicaLost, Unavailable
from deployments.handles import platform_error


def raised(cause: Exception) -> Exception:
    """As Ray raises it at the caller: an instance of both kinds."""
    return RayTaskError("generate", "Traceback: /secret", cause).as_instanceof_cause()


def test_a_platform_error_comes_back_as_it_was() -> None:
    error = platform_error(raised(ContextLengthExceeded("9 > 8", param="messages")), "chat")
    assert type(error) is ContextLengthExceeded
    assert (error.message, error.param) == ("9 > 8", "messages")


@pytest.mark.parametrize(
    ("error", "kind", "retry"),
    [
        (BackPressureError(9, 8), Overloaded, 1.0),
        (raised(BackPressureError(9, 8, retry_after_s=4.0)), Overloaded, 4.0),
        (ActorDiedError(), ReplicaLost, 1.0),
        (ActorUnavailableError("x", None), ReplicaLost, 1.0),
        (DeploymentUnavailableError(DeploymentID("LLM", "model-chat")), Unavailable, 1.0),
        (RayServeException("no application"), Unavailable, 1.0),
        (TaskCancelledError(), Unavailable, 1.0),
        (AioRpcError(StatusCode.CANCELLED, Metadata(), Metadata(), "10.0.0.1 secret"), ReplicaLost, 1.0),
        (raised(ValueError("a bug")), PlatformError, None),
        (ValueError("a bug"), PlatformError, None),
    ],
)
def test_failures_become_ours(error: Exception, kind: type[PlatformError], retry: float | None) -> None:
    ours = platform_error(error, "chat")
    assert type(ours) is kind
    assert ours.retry_after_s == retry
    assert "secret" not in ours.message
