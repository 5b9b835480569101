"""The profile of a step: which part gets which operator, and that the parts add up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.parts import (
    ATTENTION,
    BROADCAST,
    LINEAR,
    PYTHON,
    REDUCE,
    REST,
    SAMPLING,
    SCHEDULING,
    Event,
    divide,
    sort_counters,
    sort_events,
)
from bench.step_profile import Measurement, own_counters, rows, table

INSIDE = {LINEAR: 4.0, ATTENTION: 2.0, REST: 1.0, REDUCE: 0.0}


def test_an_operator_belongs_to_the_part_that_calls_it() -> None:
    events = [
        Event(["model", "aten::linear"], 1.0),
        Event(["model", "aten::linear", "aten::addmm"], 2.0),
        Event(["model", "attention", "aten::index_select"], 4.0),
        Event(["model", "attention", "aten::matmul", "aten::bmm"], 8.0),
        Event(["model", "aten::mul"], 16.0),
        Event(["model", "RowParallel", "c10d::allreduce_"], 32.0),
    ]
    assert sort_events(events) == {LINEAR: 3.0, ATTENTION: 12.0, REST: 16.0, REDUCE: 32.0}


def test_what_is_not_called_by_the_model_counts_for_nothing() -> None:
    assert sum(sort_events([Event(["aten::linear"], 1.0), Event(["gloo:all_reduce"], 1.0), Event(["model"], 1.0)]).values()) == 0


def test_a_runners_own_counters_are_sorted_by_their_words() -> None:
    counters = {"qkv_proj": 1.0, "lm head": 2.0, "attention": 4.0, "rotary": 8.0, "all_reduce": 16.0, "updates": 32.0}
    assert sort_counters(counters) == {LINEAR: 3.0, ATTENTION: 4.0, REST: 40.0, REDUCE: 16.0}


def test_the_parts_add_up_to_the_step() -> None:
    parts = divide(model_s=10.0, inside=INSIDE, outside_s=3.0, sampling_s=1.0, broadcast_s=0.5)
    assert (parts[PYTHON], parts[SAMPLING], parts[SCHEDULING], parts[BROADCAST]) == (3.0, 1.0, 2.0, 0.5)
    assert sum(parts.values()) == 13.5


def test_no_part_is_negative_or_longer_than_the_whole() -> None:
    parts = divide(model_s=3.5, inside=INSIDE, outside_s=0.5, sampling_s=1.0, broadcast_s=0.0)
    assert (parts[LINEAR], parts[ATTENTION], parts[REST]) == (2.0, 1.0, 0.5)
    assert (parts[PYTHON], parts[SCHEDULING]) == (0.0, 0.0)


def test_a_runner_that_counts_is_asked_and_another_is_not() -> None:
    class Counting:
        def profile(self) -> dict[str, float]:
            return {"linear": 1.0}

    assert own_counters(Counting()) == {"linear": 1.0}
    assert own_counters(object()) == {}


def test_the_table_leaves_out_parts_that_nobody_has() -> None:
    parts = divide(
        model_s=0.008,
        inside={LINEAR: 0.004, ATTENTION: 0.002, REST: 0.001, REDUCE: 0.0},
        outside_s=0.002,
        sampling_s=0.001,
        broadcast_s=0,
    )
    m = Measurement("S", 1, 8, 0.010, parts, 1.25, {}, bytes_per_s=50e9, step_bytes=250_000_000)
    shown = table([m])
    assert not {BROADCAST, REDUCE} & set(shown.columns)
    assert dict(zip(shown.columns, shown.lines[0], strict=True))[LINEAR] == "4.00 (40%)"
    assert dict(zip(shown.columns, shown.lines[0], strict=True))["of the bound"] == "50%"
    assert rows([m])[0].ours == 10.0


@pytest.mark.slow
def test_the_program_finds_linear_and_attention_in_a_real_model() -> None:
    root = Path(__file__).parents[2]
    words = [
        "bench.step_profile",
        "--models",
        "S",
        "--running",
        "2",
        "--context",
        "8",
        "--steps",
        "2",
        "--watched",
        "1",
        "--dry-run",
    ]
    result = subprocess.run([sys.executable, "-m", *words], cwd=root, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr
    assert "S, tp=1, 2:" in result.stderr
