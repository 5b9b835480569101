"""Which checkpoint is resumed from, when parts are missing, damaged or of another size of group."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.storage import Storage
from training.checkpoint import Checkpoints


def publish(root: Path, rank: int, step: int, world: int = 2) -> Path:
    source = root / f"source-{rank}-{step}"
    source.mkdir()
    (source / "state.pt").write_bytes(bytes([rank, step]) * 100)
    storage = Storage(root / "store" / f"rank-{rank}")
    storage.publish(source, f"step-{step:08d}-of-{world}")
    return storage.fetch(f"step-{step:08d}-of-{world}")


def latest(root: Path, world: int = 2) -> int | None:
    return Checkpoints(str(root / "store"), rank=0, world=world).latest()


def test_a_run_without_checkpoints_starts_at_the_beginning(tmp_path: Path) -> None:
    assert latest(tmp_path) is None


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    for step in (10, 20):
        for rank in (0, 1):
            publish(tmp_path, rank, step)
    assert latest(tmp_path) == 20


@pytest.mark.parametrize("rank_that_died", [0, 1])
def test_a_checkpoint_that_one_rank_did_not_finish_is_passed_over(tmp_path: Path, rank_that_died: int) -> None:
    for rank in (0, 1):
        publish(tmp_path, rank, 10)
    publish(tmp_path, 1 - rank_that_died, 20)
    assert latest(tmp_path) == 10


@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_part_spoils_its_checkpoint_and_no_other(tmp_path: Path, rank: int) -> None:
    for step in (10, 20):
        parts = [publish(tmp_path, part, step) for part in (0, 1)]
    path = parts[rank] / "state.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert latest(tmp_path) == 10
    (parts[rank] / "state.pt").unlink()
    assert latest(tmp_path) == 10


def test_a_checkpoint_of_another_number_of_workers_is_not_taken(tmp_path: Path) -> None:
    for rank in range(2):
        publish(tmp_path, rank, 10, world=2)
    assert latest(tmp_path, world=1) is None
    assert latest(tmp_path, world=2) == 10
