"""Runs that go on, and gaps between tokens."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from bench.harness import Spread, machine
from bench.measurement import Measurement, Run, gaps

SPREAD = Spread(0.1, 0.2, 0.3, 0.4)
MEASURED = Measurement("a", "S", 8, 1, False, 100.0, SPREAD, SPREAD, SPREAD, 1 << 30, 1.0)
OPTIONS = {"engines": ["a", "b"], "models": ["S", "M"]}


def test_gaps_are_between_moments() -> None:
    assert gaps([1.0, 1.5, 1.5, 1.5, 3.0]) == [0.5, 1.5]
    assert gaps([1.0]) == []


def test_a_measurement_survives_json() -> None:
    assert Measurement.parse(json.loads(json.dumps(asdict(MEASURED)))) == MEASURED


def test_what_is_missing_comes_model_by_model() -> None:
    assert Run(OPTIONS, "", [MEASURED]).missing == [("S", "b"), ("M", "a"), ("M", "b")]


def test_a_run_is_complete_when_the_rest_could_not_run() -> None:
    run = Run(OPTIONS | {"models": ["S"]}, "", [MEASURED])
    assert not run.is_complete
    run.left_out["b, S"] = "not installed"
    assert run.is_complete


def test_the_most_bandwidth_counts() -> None:
    run = Run(OPTIONS, "")
    for bytes_per_s in (2.0, 3.0, 1.0):
        run.note_bandwidth("S", bytes_per_s)
    assert run.bandwidth == {"S": 3.0}


def stored(tmp_path: Path, run: Run, **more: object) -> Path:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps({"machine": machine(), "command": run.command, "versions": run.versions} | run.state() | more))
    return path


def test_a_cut_run_is_loaded_and_tries_again_what_could_not_run(tmp_path: Path) -> None:
    run = Run(OPTIONS, "command", [MEASURED], {"torch": "2"}, {"b, S": "not installed"}, {"S": 1.0})
    found = Run.load(stored(tmp_path, run))
    assert (found.options, found.command, found.measurements) == (run.options, run.command, run.measurements)
    assert (found.versions, found.bandwidth, found.left_out) == ({"torch": "2"}, {"S": 1.0}, {})
    assert ("S", "b") in found.missing


@pytest.mark.parametrize(("more", "why"), [({"complete": True}, "is complete"), ({"machine": {"cpu": "other"}}, "another machine")])
def test_figures_of_two_runs_are_never_mixed(tmp_path: Path, more: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Run.load(stored(tmp_path, Run(OPTIONS, "", [MEASURED]), **more))
