"""Copies of cut weights: kept whole, found again, never believed, and bounded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine import copies
from deployments.engine.copies import Copies, Copy
from deployments.engine.progress import Progress
from deployments.engine.stages import Place

SHAPES = {"a": (64, 8), "b": (3,), "c": (0, 5)}


@pytest.fixture(autouse=True)
def worth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "WORTH_BYTES", 1)


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kinds = {"a": torch.bfloat16, "b": torch.float32, "c": torch.float32}
    return {name: torch.randn(shape, generator=generator).to(kinds[name]) for name, shape in SHAPES.items()}


def copy(folder: Path, model: str = "m", *, limit: int = 1 << 20, rank: int = 0, cuts: str = "x") -> Copy:
    return Copies(folder, limit).of(model, place=Place(rank, tp=2), dtype="bfloat16", cuts=[cuts])


def read(one: Copy) -> dict[str, torch.Tensor] | None:
    return one.read(SHAPES, Progress())


def test_what_was_written_is_read_and_private(tmp_path: Path) -> None:
    one = copy(tmp_path)
    assert read(one) is None
    one.write(tensors())
    found = read(one)
    assert found is not None
    assert {name: found[name].dtype for name in found} == {name: tensor.dtype for name, tensor in tensors().items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())
    assert one.path.stat().st_mode & 0o77 == one.path.parent.stat().st_mode & 0o77 == 0
    assert [path.name for path in one.path.parent.iterdir()] == ["0-of-2.safetensors"], "nothing unfinished is left"


def test_another_model_rank_or_cut_is_another_copy(tmp_path: Path) -> None:
    copy(tmp_path).write(tensors())
    assert read(copy(tmp_path, "other")) is None
    assert read(copy(tmp_path, rank=1)) is None
    assert read(copy(tmp_path, cuts="y")) is None


def test_a_file_moved_in_from_elsewhere_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    foreign, one = copy(tmp_path, "other"), copy(tmp_path)
    foreign.write(tensors())
    one.path.parent.mkdir()
    foreign.path.rename(one.path)
    assert read(one) is None
    assert "cut weights ignored" in caplog.text
    assert not one.path.exists()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_changed_byte_and_any_truncation_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    one = copy(tmp_path_factory.mktemp("copy"))
    one.write(tensors())
    content = bytearray(one.path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:place]
    else:
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    one.path.write_bytes(content)
    found = read(one)
    assert found is None or all(torch.equal(found[name], tensor) for name, tensor in tensors().items())


def test_the_least_recently_used_model_goes_first(tmp_path: Path) -> None:
    size = sum(tensor.nbytes for tensor in tensors().values())
    several = [copy(tmp_path, name, limit=int(2.9 * size) * 2) for name in "abc"]
    for age, one in enumerate(several[:2]):
        for rank in (0, 1):
            copy(tmp_path, "ab"[age], limit=1 << 20, rank=rank).write(tensors())
        os.utime(one.path.parent, (age, age))
    assert read(several[0]) is not None  # used just now
    several[2].write(tensors())
    assert [one.path.exists() for one in several] == [True, False, True]


def test_what_never_fits_is_not_kept_and_removes_nothing(tmp_path: Path) -> None:
    first = copy(tmp_path)
    first.write(tensors())
    copy(tmp_path, "other", limit=100).write(tensors())
    assert [path.parent.name for path in tmp_path.glob("*/*")] == [first.path.parent.name]


def test_a_folder_that_can_not_be_written_fails_no_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    copy(tmp_path / "file").write(tensors())
    assert "could not be kept" in caplog.text
