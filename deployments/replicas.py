"""What Serve is told of a model whose replica is one process with all of it: encoders and tabular models."""

from __future__ import annotations

from typing import Any

from cluster.settings import Settings
from cluster.types import Deployment


def options(name: str, deployment: Deployment, *, cpus: float, calls: int, settings: Settings) -> dict[str, Any]:
    """For `serve.deployment`. `calls`: how many a replica has at once, and how many may wait for it."""
    scaling: dict[str, Any] = {"num_replicas": deployment.min_replicas}
    if deployment.max_replicas > deployment.min_replicas:
        bounds = {"min_replicas": deployment.min_replicas, "max_replicas": deployment.max_replicas}
        scaling = {"autoscaling_config": bounds | {"target_ongoing_requests": 16}}
    return {
        "name": name,
        "ray_actor_options": {"num_cpus": cpus},
        "max_ongoing_requests": calls,
        "max_queued_requests": calls,
        "graceful_shutdown_timeout_s": settings.gateway.max_stream_s + 10,
        "max_surge_percent": 100,  # a new version starts before the old one stops
        "health_check_period_s": 2,
        "health_check_timeout_s": 30,
        "max_constructor_retry_count": 1,
        "logging_config": {"enable_access_log": False},  # the gateway writes one record of every call
        **scaling,
    }
