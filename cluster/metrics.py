"""Every metric of the platform, declared once. Dashboards and alerts are written against this page.

Labels hold only what the platform itself chose: route templates, status codes, names of deployed models, states. Nothing that a
client sends becomes a label, so the number of series is bounded. Each process has its own values; a scraper adds them up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

# The gateway
GATEWAY_REQUESTS = Counter("mmaas_gateway_requests_total", "Answered requests", ("route", "method", "status"))
GATEWAY_LATENCY = Histogram("mmaas_gateway_request_seconds", "Time to the end of the answer", ("route",), buckets=_SECONDS)
GATEWAY_INSIDE = Gauge("mmaas_gateway_requests_inside", "Requests that are being answered, over HTTP and handles")
CACHE = Counter("mmaas_gateway_cache_total", "Parts of calls by how the response cache answered", ("outcome",))
RATE_LIMITED = Counter("mmaas_gateway_rate_limited_total", "Calls refused by a limit of their project, model or key")
TOKENS_IN = Counter("mmaas_gateway_tokens_in_total", "Prompt tokens of finished calls", ("model",))
TOKENS_OUT = Counter("mmaas_gateway_tokens_out_total", "Output tokens of finished calls", ("model",))
ROWS = Counter("mmaas_gateway_rows_total", "Rows that tabular models answered for", ("model",))
FIRST_TOKEN = Histogram("mmaas_gateway_first_token_seconds", "Arrival to first token", ("model",), buckets=_SECONDS)

# Tenancy
IDEMPOTENT = Counter("mmaas_idempotent_calls_total", "Calls with an Idempotency-Key: executed, replayed, refused", ("outcome",))
SPEND_ALERTS = Counter("mmaas_spend_alerts_total", "Spend alerts that were passed, each once in a day or month")
KEPT = Counter("mmaas_kept_calls_total", "Calls whose input and output were to be kept, by what became of them", ("outcome",))

# The engine: counted in its own process, told by `LLM.stats`, and added up over a model's replicas by whoever shows them
ENGINE: Mapping[str, tuple[type[GaugeMetricFamily] | type[CounterMetricFamily], str, str]] = {
    "running": (GaugeMetricFamily, "mmaas_engine_running", "Sequences in the running batch"),
    "waiting": (GaugeMetricFamily, "mmaas_engine_waiting", "Sequences that wait for a place in the batch"),
    "waiting_batch": (GaugeMetricFamily, "mmaas_engine_waiting_batch", "Of these, of the class that yields (service_tier flex)"),
    "streams": (GaugeMetricFamily, "mmaas_engine_streams", "Requests that a replica works on or holds in its queue"),
    "blocks_total": (GaugeMetricFamily, "mmaas_engine_kv_blocks", "Blocks of the KV cache"),
    "blocks_used": (GaugeMetricFamily, "mmaas_engine_kv_blocks_used", "KV blocks that running sequences hold"),
    "blocks_cached": (GaugeMetricFamily, "mmaas_engine_kv_blocks_cached", "KV blocks kept for prompts that start alike"),
    "steps": (CounterMetricFamily, "mmaas_engine_steps", "Forward passes"),
    "busy_s": (CounterMetricFamily, "mmaas_engine_busy_seconds", "Time in steps, scheduling and sampling included"),
    "model_s": (CounterMetricFamily, "mmaas_engine_model_seconds", "Time in the model alone"),
    "preemptions": (CounterMetricFamily, "mmaas_engine_preemptions", "Sequences put back because blocks ran out"),
    "aborted": (CounterMetricFamily, "mmaas_engine_aborted", "Choices stopped early: the caller left, or a stop string came"),
    "failed": (CounterMetricFamily, "mmaas_engine_failed", "Choices ended by an error of the model: no token could be chosen"),
    "asleep": (GaugeMetricFamily, "mmaas_engine_asleep", "Replicas that have given their memory back"),
    "lost": (CounterMetricFamily, "mmaas_engine_groups_lost", "Shard groups that died or were stuck, and were replaced"),
    "stuck": (CounterMetricFamily, "mmaas_engine_groups_stuck", "Of these, alive but without progress"),
    "prompt_tokens": (CounterMetricFamily, "mmaas_engine_prompt_tokens", "Prompt tokens of answered requests"),
    "cached_tokens": (CounterMetricFamily, "mmaas_engine_prefix_hit_tokens", "Of these, found in the prefix cache"),
    "output_tokens": (CounterMetricFamily, "mmaas_engine_output_tokens", "Tokens sampled"),
    "drafted_tokens": (CounterMetricFamily, "mmaas_engine_draft_tokens", "Tokens guessed and verified"),
    "accepted_tokens": (CounterMetricFamily, "mmaas_engine_draft_accepted_tokens", "Of these, right: output without a step"),
    "adapters": (GaugeMetricFamily, "mmaas_engine_adapters", "LoRA adapters that are loaded"),
    "adapter_loads": (CounterMetricFamily, "mmaas_engine_adapter_loads", "LoRA adapters loaded since the start"),
    "rows": (CounterMetricFamily, "mmaas_encoder_rows", "Inputs that an encoder has encoded"),
    "predicted_rows": (
        CounterMetricFamily,
        "mmaas_predictor_rows",
        "Rows that a tabular model has answered for",
    ),
    "waiting_tokens": (GaugeMetricFamily, "mmaas_encoder_waiting_tokens", "Tokens of inputs that wait for an encoder"),
}

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def count_request(route: str | None, method: str, status: int, seconds: float) -> None:
    """Record one answered request. `route` is the matched route's template (`/v1/models/{id}`), None when none matched."""
    label = route or "unmatched"
    GATEWAY_REQUESTS.labels(label, method if method in _METHODS else "other", str(status)).inc()
    GATEWAY_LATENCY.labels(label).observe(seconds)


def exposition(engines: Mapping[str, Mapping[str, float]]) -> tuple[bytes, str]:
    """This process's metrics and the engines' (by model) in Prometheus' text format, and their content type."""
    registry = CollectorRegistry()
    registry.register(_Engines(engines))
    return generate_latest() + generate_latest(registry), CONTENT_TYPE_LATEST


class _Engines(Collector):
    """What the engines told of themselves a moment ago."""

    def __init__(self, engines: Mapping[str, Mapping[str, float]]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        for field, (kind, name, text) in ENGINE.items():
            family = kind(name, text, labels=("model",))
            for model, stats in self._engines.items():
                if field in stats:  # a replica of an older version may not count it yet
                    family.add_metric([model], stats[field])
            yield family
