"""Every metric of the platform, declared once. Dashboards and alerts are written against this page.

Labels hold only what the platform itself chose: route templates, status codes, names of deployed models, states. Nothing that a
client sends becomes a label, so the number of series is bounded. Each process has its own values; a scraper adds them up.
"""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 30)

# The gateway
GATEWAY_REQUESTS = Counter("mmaas_gateway_requests_total", "Answered requests", ("route", "method", "status"))
GATEWAY_LATENCY = Histogram("mmaas_gateway_request_seconds", "Time to the end of the answer", ("route",), buckets=_SECONDS)
GATEWAY_STREAMS = Gauge("mmaas_gateway_streams", "Streams being written")
TOKENS_IN = Counter("mmaas_gateway_tokens_in_total", "Prompt tokens of finished calls", ("model",))
TOKENS_OUT = Counter("mmaas_gateway_tokens_out_total", "Output tokens of finished calls", ("model",))
FIRST_TOKEN = Histogram("mmaas_gateway_first_token_seconds", "Arrival to first token", ("model",), buckets=_SECONDS)

# The engine, one shard group each
ENGINE_RUNNING = Gauge("mmaas_engine_running", "Sequences in the running batch", ("model",))
ENGINE_WAITING = Gauge("mmaas_engine_waiting", "Sequences that wait for a place in the batch", ("model",))
ENGINE_BLOCKS = Gauge("mmaas_engine_kv_blocks", "KV blocks by state: used, free or cached", ("model", "state"))
ENGINE_PREFIX_HIT_TOKENS = Counter("mmaas_engine_prefix_hit_tokens_total", "Prompt tokens found in the prefix cache", ("model",))
ENGINE_PREEMPTIONS = Counter("mmaas_engine_preemptions_total", "Sequences put back because blocks ran out", ("model",))
ENGINE_STEPS = Counter("mmaas_engine_steps_total", "Forward passes", ("model",))
ENGINE_STEP_SECONDS = Histogram("mmaas_engine_step_seconds", "Time of one forward pass", ("model",), buckets=_STEP_SECONDS)

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def count_request(route: str | None, method: str, status: int, seconds: float) -> None:
    """Record one answered request. `route` is the matched route's template (`/v1/models/{id}`), None when none matched."""
    label = route or "unmatched"
    GATEWAY_REQUESTS.labels(label, method if method in _METHODS else "other", str(status)).inc()
    GATEWAY_LATENCY.labels(label).observe(seconds)


def exposition() -> tuple[bytes, str]:
    """This process's metrics in Prometheus' text format, and their content type."""
    return generate_latest(), CONTENT_TYPE_LATEST
