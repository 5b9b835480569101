"""What the benchmark of embeddings makes of its turns."""

from __future__ import annotations

import numpy as np
import pytest

from bench.embeddings import LEAST_TURNS, PEER, Measurement, agree, measure, rows, summary, table

SECONDS = {f"{PEER}, batch 32": [4.0, 8.0, 4.0], f"{PEER}, batch 128": [5.0, 5.0, 9.0], "engine": [2.0, 5.0, 2.0]}


def measured() -> list[Measurement]:
    return [Measurement("mixed", "float32", *numbers) for numbers in summary(SECONDS, rows=20, tokens=200)]


def test_a_ratio_is_of_one_turn_with_the_peers_better_batch_size() -> None:
    """A slow turn of all of them says nothing about any."""
    *peers, ours = measured()
    assert ours.ratios == [2.0, 1.6, 2.0]
    assert ours.ratio == 2.0
    assert [peer.ratio for peer in peers] == [1.0, 0.8]
    assert (ours.rows_per_s, ours.tokens_per_s) == (10.0, 100.0)


def test_the_table_and_the_rows_say_the_same() -> None:
    assert table(measured()).lines[-1] == ["mixed", "float32", "engine", "10", "100", "2.00", "1.60 to 2.00"]
    (row,) = rows(measured())
    assert (row.ours, row.best_peer, row.peer, row.ratio) == (10.0, 5.0, PEER, 2.0)


@pytest.mark.parametrize("wrong", [0.5, np.nan])
def test_embeddings_that_differ_are_no_measurement(wrong: float) -> None:
    one = np.eye(3, dtype=np.float32)
    agree({PEER: one, "engine": one}, 0.9999)
    other = one.copy()
    other[1] *= wrong
    with pytest.raises(RuntimeError, match="engine gives other embeddings"):
        agree({PEER: one, "engine": other}, 0.9999)


@pytest.mark.parametrize(("most_s", "turns"), [(0.0, LEAST_TURNS), (100.0, 4)])
def test_a_slow_work_gets_the_least_turns_and_all_ways_get_as_many(most_s: float, turns: int) -> None:
    calls: list[str] = []

    def encode(way: str) -> np.ndarray:
        calls.append(way)
        return np.eye(2, dtype=np.float32)

    ways = {way: lambda _, way=way: encode(way) for way in (f"{PEER}, batch 32", "engine")}
    found = measure("mixed", "float32", ["one", "two"], ways, 4, most_s)
    assert [len(m.ratios) for m in found] == [turns, turns]
    assert [calls.count(way) for way in ways] == [turns + 1, turns + 1], "and one to warm up"
    assert calls[:6] == [*ways, *ways, *reversed(ways)]
