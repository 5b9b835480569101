"""How turns are shown, and whom the benchmark moves."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from bench.goodput import Measurement
from bench.harness import Spread
from bench.priority import Turn, around, table


def measured(goodput: float, first_s: float, token_s: float) -> Measurement:
    spreads = [Spread(s, s, s, s) for s in (first_s, token_s)]
    return Measurement("x", "S", 16, 320, goodput, *spreads, 400.0, {}, 0.1, 0.01)


def test_table_says_in_how_many_turns_it_was_better() -> None:
    turns = [
        Turn(measured(10, 0.3, 0.05), measured(12, 0.2, 0.04)),
        Turn(measured(14, 0.2, 0.04), measured(13, 0.25, 0.045)),
        Turn(measured(11, 0.4, 0.06), measured(15, 0.1, 0.03)),
    ]
    shown = table(turns, "S", 16)
    assert "better in 2 of 3 turns" in shown.title
    assert list(shown.lines[0]) == ["1", "10.00", "12.00", "300", "200", "50.0", "40.0"]
    assert list(shown.lines[-1]) == ["median", "11", "13", "300", "200", "50", "40"]


def test_only_what_is_around_ranks_is_moved() -> None:
    titles = ["ray::ServeReplica:gateway:Gateway", "ray::ServeReplica:model-s:LLM", "ray::ShardActor.lead"]
    program = "import sys; sys.stdin.read()"
    started = [subprocess.Popen([sys.executable, "-c", program, title], stdin=subprocess.PIPE) for title in titles]
    try:
        family = [psutil.Process(process.pid) for process in started]
        assert around(family) == family[:2]
        with pytest.raises(RuntimeError, match="1 processes were found"):
            around(family[1:])
    finally:
        for process in started:
            process.communicate(b"")
