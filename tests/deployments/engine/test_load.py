"""Loading a rank's own part: the same tensors as cutting a whole model, with a fraction of its memory; copies; refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import ModelNotServable
from cluster.settings import EngineSettings
from deployments.engine import copies, load
from deployments.engine.census import take
from deployments.engine.families import SHARDABLE
from deployments.engine.layouts import rank_sizes
from deployments.engine.progress import Loaded, Progress
from deployments.engine.stages import Place
from tests.deployments.engine.tiny import build

ROOT = Path(__file__).parents[3]
OFF = EngineSettings(cut_weights_bytes=0)


def lone_rank(rank: int, size: int | str, *words: str | Path) -> dict[str, Any]:
    """In a process of its own."""
    command = [sys.executable, "-m", "tests.deployments.engine.lone_rank", str(rank), str(size), *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family that can be sharded; one more whose words are tied to its output."""
    root = tmp_path_factory.mktemp("families")
    options = {family: {} for family in SHARDABLE} | {"tied": {"tie_word_embeddings": True}}
    for family, extra in options.items():
        build("llama" if family == "tied" else family, **extra).save_pretrained(root / family)
    return {family: root / family for family in options}


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "size", "dtype"), [(0, 1, "bfloat16"), (0, 2, "float32"), (1, 2, "bfloat16"), (3, 4, "float32")])
def test_every_family_loads_what_autotp_cuts_from_a_whole_model(
    families: dict[str, Path], rank: int, size: int, dtype: str
) -> None:
    found = lone_rank(rank, size, "compare", dtype, *families.values())
    assert found.keys() == families.keys()
    assert {name: outcome for name, outcome in found.items() if outcome["differs"]} == {}
    assert {name for name, outcome in found.items() if outcome["source"] != "model"} == set(), "fell back to the whole model"
    if dtype == "float32":  # in others a few parameters stay wide
        counted = {name: take(path) for name, path in families.items()}
        told = {name: 4 * sum(one.size_on(part, rank, size) for part in one.parameters) for name, one in counted.items()}
        assert told == {name: outcome["bytes"] for name, outcome in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(4))
def test_every_family_holds_what_is_planned_in_two_stages_of_two_parts(families: dict[str, Path], rank: int) -> None:
    place = Place(rank, tp=2, pp=2)
    found = lone_rank(rank, "2x2", "hold", *families.values())
    told = {name: rank_sizes(take(path), 2, 2, 1)[place.stage, place.part] for name, path in families.items()}
    assert told == {name: outcome["held"] for name, outcome in found.items()}
    assert {outcome["source"] for outcome in found.values()} == {"model"}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 MB of random weights, nearly all of them in matrices that are cut."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 256, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5, "num_attention_heads": 8}
    directory = tmp_path_factory.mktemp("large") / "model"
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=8, max_position_embeddings=64))
    model.save_pretrained(directory, max_shard_size="100MB")
    return directory


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    build("llama").save_pretrained(directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_rank_needs_memory_for_its_part_alone(small: Path, large: Path, tmp_path: Path, size: int) -> None:
    whole = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    found = lone_rank(0, size, "measure", small, large, tmp_path)
    assert found["source"] == "model"
    assert found["read"] == found["of"] == found["held"], "every byte of the part is read once, and no other"
    assert found["held"] < 1.05 * whole / size
    assert found["held"] < found["rose"] < 1.25 * whole / size, "the files' pages count too"


@pytest.mark.slow
def test_the_second_start_reads_the_copy_and_a_damaged_one_is_ignored(small: Path, large: Path, tmp_path: Path) -> None:
    first, second = (lone_rank(1, 2, "measure", small, large, tmp_path) for _ in range(2))
    assert (first["source"], second["source"]) == ("model", "copy")
    assert second["held"] == first["held"]
    assert second["rose"] < 1.25 * second["held"]
    (copy,) = tmp_path.glob("shards/*/1-of-2.safetensors")
    assert copy.stat().st_mode & 0o77 == 0
    damage(copy)
    assert lone_rank(1, 2, "measure", small, large, tmp_path)["source"] == "model"


def damage(path: Path) -> None:
    """One bit in the middle."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    build("qwen3").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(directory: Path, name: str, tensor: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors | ({} if tensor is None else {name: tensor}), path, metadata={"format": "pt"})


def test_a_missing_tensor_is_named(directory: Path) -> None:
    change(directory, "model.layers.1.mlp.up_proj.weight", None)
    with pytest.raises(ModelNotServable, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load.load(directory, "float32", None, OFF, Progress())


def test_a_tensor_of_another_shape_is_named_with_both(directory: Path) -> None:
    change(directory, "model.layers.1.mlp.up_proj.weight", torch.zeros(3, 64))
    with pytest.raises(ModelNotServable, match=r"up_proj\.weight has the shape \(3, 64\) in the weights, not \(96, 64\)"):
        load.load(directory, "float32", None, OFF, Progress())


def test_a_tensor_that_the_model_lacks_is_left_alone(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"surplus": torch.zeros(5)}, directory / "model.safetensors", metadata={"format": "pt"})
    progress = Progress()
    load.load(directory, "float32", None, OFF, progress)
    assert progress.now().bytes_read == sum(tensor.nbytes for tensor in tensors.values())


def test_conversion_is_kept_as_a_copy_and_equal_types_are_not(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "WORTH_BYTES", 0)
    settings = EngineSettings(cache=tmp_path / "cache")
    load.load(directory, "float32", None, settings, Progress())
    assert list(tmp_path.glob("cache/shards/*/*")) == []
    sources, models = [], []
    for _ in range(2):
        progress = Progress()
        models.append(load.load(directory, "bfloat16", None, settings, progress).state_dict())
        sources.append(progress.now().source)
    assert sources == ["model", "copy"]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_changed_weights_are_not_taken_from_the_old_copy(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "WORTH_BYTES", 0)
    settings = EngineSettings(cache=tmp_path / "cache")
    load.load(directory, "bfloat16", None, settings, Progress())
    change(directory, "model.norm.weight", torch.full((64,), 7.0))
    model = load.load(directory, "bfloat16", None, settings, Progress())
    assert model.state_dict()["model.norm.weight"].tolist() == [7.0] * 64


def test_progress_is_seen_while_it_happens() -> None:
    progress = Progress()
    assert progress.now() == Loaded(0, 0, 0.0, "")
    progress.begin("model", 10)
    progress.add(4)
    now = progress.now()
    assert (now.bytes_read, now.bytes_total, now.source) == (4, 10, "model")
    progress.add(6)
    progress.end()
    ended = progress.now()
    assert ended.bytes_read == 10
    assert ended.bytes_per_second == pytest.approx(10 / ended.seconds)
    assert progress.now() == ended, "the clock stands still after the end"
