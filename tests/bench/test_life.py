"""The benchmark of a model's life: that it lives one, and what it makes of the times."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.life import Lived, check, live, rows, tables
from tests.deployments.engine.families import build

LIVED = Lived("S", 80.0, 2.0, 0.1, 0.05, 1.5, 1.6, 500.0, 700.0, 520.0, 705.0)


def test_both_ways_of_choosing_are_measured() -> None:
    found = check(4, 100, 5)
    assert (found.rows, found.vocab_size) == (4, 100)
    assert min(found.without_us, found.with_us) > 0


@pytest.mark.slow
def test_a_life_is_lived(tmp_path: Path) -> None:
    lived = live("tiny", build("llama", tmp_path / "llama"))
    assert 0 < lived.scan_s < lived.load_s
    assert min(lived.sleep_s, lived.wake_s, lived.swap_s) > 0


def test_tables_say_what_was_measured() -> None:
    cost, life = tables([check(2, 10, 1)], [LIVED])
    assert cost.lines[-1] == ["load of S", "1.90 s", "2.00 s", "1.053"]
    assert life.lines[0][-4:] == ["500 MiB", "700 MiB", "520 MiB", "705 MiB"]
    assert [row.ours for row in rows([LIVED])] == [1.5]
