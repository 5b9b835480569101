"""What is made of the engine benchmark's measurements."""

from __future__ import annotations

import pytest

from bench.bandwidth import kv_bytes, weight_bytes
from bench.engine_report import BEYOND, BOUND, bound, plots, ratios, rows, tables
from bench.harness import Spread
from bench.measurement import Measurement, Run
from bench.models import MODELS


def measurement(engine: str, tokens_per_s: float, *, ours: bool = False, tp: int = 1, concurrency: int = 8) -> Measurement:
    times = [Spread(s, 2 * s, 3 * s, 4 * s) for s in (1 / tokens_per_s, 0.002, 0.1 / tokens_per_s)]
    return Measurement(engine, "S", concurrency, tp, ours, tokens_per_s, *times, 1 << 30, 1.0)


MEASURED = [
    measurement("mmaas tp=1", 30, ours=True),
    measurement("mmaas tp=2", 15, ours=True, tp=2),
    measurement("slow", 20),
    measurement("fast", 60),
    measurement("fast", 600, concurrency=32),
]
OPTIONS = {"engines": ["fast"], "models": ["S"], "concurrency": [8, 32], "tokens": 128, "requests": 64, "threads": 2}
RUN = Run(OPTIONS, "command", MEASURED, bandwidth={"S": 1e9, BEYOND: 5e8})


def test_ours_is_compared_with_the_best_at_the_same_work() -> None:
    assert [(row.tp, row.peer, row.ratio) for row in rows(MEASURED)] == [(1, "fast", 0.5), (2, "fast", 0.25)]


def test_ours_is_compared_with_every_peer_in_every_respect() -> None:
    found = {(ratio["engine"], ratio["peer"]): ratio for ratio in ratios(MEASURED)}
    assert found.keys() == {(own, peer) for own in ("mmaas tp=1", "mmaas tp=2") for peer in ("slow", "fast")}
    ratio = found["mmaas tp=1", "slow"]
    assert [ratio[name] for name in ("tokens_per_s", "first_token", "gap_p99", "memory")] == [1.5, 1.5, 1.5, 1.0]


def test_the_table_of_speed_has_every_measurement_best_first() -> None:
    lines = tables(RUN)[0].lines
    assert [(line[1], line[2], line[4]) for line in lines] == [
        ("8", "fast", "1.00"),
        ("8", "mmaas tp=1", "0.50"),
        ("8", "slow", "0.33"),
        ("8", "mmaas tp=2", "0.25"),
        ("32", "fast", "1.00"),
    ]
    most = 32e9 / (weight_bytes(MODELS["S"]) + 32 * 192 * kv_bytes(MODELS["S"]))
    assert bound(RUN, "S", 32) == pytest.approx(most)
    assert lines[-1][5] == f"{600 / most:.0%}"


def test_the_other_tables_have_latency_ratios_and_bounds() -> None:
    _, latency, against, bounds = tables(RUN)
    assert latency.lines[1] == ["S", "8", "mmaas tp=1", "33.3 / 66.7 / 100", "2 / 4 / 6", "3.33 / 6.67 / 10", "13.3"]
    assert against.columns[3:] == ["slow", "fast"]
    assert against.lines[0] == ["S", "8", "mmaas tp=1", "1.50 / 1.50 / 1.50", "0.50 / 0.50 / 0.50"]
    assert "0.5 GB/s beyond the caches" in bounds.title
    assert bounds.lines[0][:4] == ["S", "64", "8.2", "1.0"]


def test_without_peers_or_bandwidth_there_is_less_to_show() -> None:
    alone = Run(OPTIONS, "command", MEASURED[:2])
    assert [table.title.split()[0] for table in tables(alone)] == ["Output", "Latency:"]
    assert tables(alone)[0].lines[0][5] == "-"
    assert bound(alone, "S", 8) is None


def test_plots_show_every_engine_and_the_bound() -> None:
    speed, first, between = plots(RUN)
    assert speed.series.keys() == {"mmaas tp=1", "mmaas tp=2", "slow", "fast", BOUND}
    assert speed.series["fast"] == [(8.0, 60), (32.0, 600)]
    assert [x for x, _ in speed.series[BOUND]] == [8.0, 32.0]
    assert first.series.keys() == between.series.keys() == {"fast"}
    assert between.series["fast"] == [(50.0, 2.0), (95.0, 4.0), (99.0, 6.0)]
