"""The arithmetic of the benchmark of stages."""

from __future__ import annotations

from bench import stages
from bench.stages import ALONE, IN_TURN, OVERLAPPED, TENSOR, Measurement

MEASURED = Measurement("S", 8, {OVERLAPPED: 90.0, IN_TURN: 60.0, TENSOR: 80.0, ALONE: 100.0}, {OVERLAPPED: 0.25, IN_TURN: 0.5})


def test_rows_compare_with_the_better_way_without_stages() -> None:
    (row,) = stages.rows([MEASURED])
    assert (row.peer, row.ratio, row.concurrency) == (ALONE, 0.9, 8)


def test_tables_have_ratios_and_the_share_of_waiting() -> None:
    speeds, over = stages.tables([MEASURED], {1: 40.4})
    assert speeds.lines == [["S", "8", "90", "60", "80", "100", "1.50", "0.90", "25%", "50%"]]
    assert len(speeds.columns) == len(speeds.lines[0])
    assert over.lines == [["1", "40"]]
