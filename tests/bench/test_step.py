"""The step benchmark: what it puts into a step, and what it makes of the times."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from bench.harness import Row
from bench.step import Case, Measurement, NoModel, Unmetered, rows, steps, table
from deployments.engine.batch import Batch
from deployments.engine.engine import Engine

MEASURED = [
    Measurement("decode", 32, schedule_us=10.0, pack_us=1.0, deliver_us=20.0, broadcast_us=100.0, batch_ints=99, metering_us=2.0)
]


def counts(case: Case, num_steps: int) -> list[list[int]]:
    """The new tokens of every sequence in each of the timed steps."""
    model = NoModel(case.running + 1, vocab_size=8)
    times = list(steps(case, num_steps, model))
    assert len(times) == num_steps
    assert all(min(t.schedule_us, t.pack_us, t.deliver_us) > 0 for t in times)
    return [Batch.unpack(batch).counts.tolist() for batch in model.batches[-num_steps:]]


def test_every_sequence_decodes_in_every_timed_step() -> None:
    assert counts(Case(running=3, chunk=0, context=20), 12) == [[1, 1, 1]] * 12


def test_a_piece_of_a_prompt_stands_beside_the_decoders_in_every_timed_step() -> None:
    assert counts(Case(running=3, chunk=16, context=20), 12) == [[1, 1, 1, 16]] * 12


def test_decoders_go_on_from_their_context() -> None:
    model = NoModel(2, vocab_size=8)
    list(steps(Case(running=1, chunk=0, context=20), 5, model))
    starts = [Batch.unpack(batch).starts.item() for batch in model.batches[1:]]
    assert starts[0] == 20
    assert all(after == before + 1 for before, after in pairwise(starts))


def test_steps_with_and_without_metering_do_the_same_work() -> None:
    case, batches = Case(running=3, chunk=16, context=20), []
    for kind in (Engine, Unmetered):
        model = NoModel(case.running + 1, vocab_size=8)
        list(steps(case, 12, model, kind))
        batches.append([batch.tolist() for batch in model.batches])
    assert batches[0] == batches[1]


def test_only_a_step_of_two_ranks_packs_and_broadcasts() -> None:
    assert (MEASURED[0].total_us(1), MEASURED[0].total_us(2)) == (30.0, 131.0)


def test_the_rows_have_no_peer() -> None:
    assert rows(MEASURED) == [
        Row("none: decode", 32, 1, 30.0, None, None, None),
        Row("none: decode", 32, 2, 131.0, None, None, None),
    ]


def test_the_table_adds_up() -> None:
    shown = table(MEASURED)
    assert dict(zip(shown.columns, shown.lines[0], strict=True)) == {
        "step": "decode",
        "sequences": "32",
        "schedule": "10",
        "deliver": "20",
        "of it metering": "2",
        "all, tp=1": "30",
        "pack": "1",
        "broadcast": "100",
        "all, tp=2": "131",
    }


@pytest.mark.slow
def test_the_program_measures_with_a_real_second_process() -> None:
    root = Path(__file__).parents[2]
    words = [sys.executable, "-m", "bench.step", "--running", "2", "--steps", "3", "--chunk", "16", "--dry-run"]
    result = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert "decode + 16, 2:" in result.stderr
