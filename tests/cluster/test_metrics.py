from __future__ import annotations

from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase

from cluster import metrics


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_requests_are_counted_by_template_and_status() -> None:
    labels = {"route": "/v1/models/{id}", "method": "GET", "status": "200"}
    before = value("mmaas_gateway_requests_total", **labels)
    metrics.count_request("/v1/models/{id}", "GET", 200, 0.2)
    assert value("mmaas_gateway_requests_total", **labels) == before + 1


def test_nothing_from_a_client_becomes_a_label() -> None:
    metrics.count_request(None, "BREW\n# HELP", 404, 0.0)
    text = metrics.exposition({})[0].decode()
    assert "BREW" not in text
    assert 'method="other",route="unmatched"' in text


def test_all_metrics_carry_the_prefix_and_are_registered() -> None:
    ours = [family.name for value in vars(metrics).values() if isinstance(value, MetricWrapperBase) for family in value.describe()]
    assert len(ours) == 12
    assert all(name.startswith("mmaas_") for name in ours)
    assert set(ours) <= {family.name for family in REGISTRY.collect()}


def test_engines_are_shown_by_model() -> None:
    counters = dict.fromkeys(metrics.ENGINE, 2.0)
    text = metrics.exposition({"chat": counters, "other": counters})[0].decode()
    assert 'mmaas_engine_running{model="chat"} 2.0' in text
    assert 'mmaas_engine_steps_total{model="other"} 2.0' in text
    assert all(name in text for _, name, _ in metrics.ENGINE.values())


def test_engine_that_does_not_count_something_is_shown_without_it() -> None:
    text = metrics.exposition({"old": {"running": 1.0}})[0].decode()
    assert 'mmaas_engine_running{model="old"} 1.0' in text
    assert "mmaas_engine_steps_total{" not in text
