"""Admission of adapters: what is refused, by which name, and that no file can make anything else happen than a refusal."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cluster.errors import ModelNotServable
from deployments.engine.adapter_files import CONFIG, MAX_RANK, WEIGHTS, base_shapes, content_digest, inspect
from deployments.engine.adapters import check_numbers, cut_pair
from deployments.engine.cuts import Cut
from tests.deployments.engine.families import build

Q = "model.layers.0.self_attn.q_proj"
BASE = {Q: (128, 32), "model.layers.1.mlp.down_proj": (32, 128)}


def write(directory: Path, *, rank: int = 4, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"], "use_dora": False}
    (directory / CONFIG).write_text(json.dumps(plain | config))
    save_file(pair(rank) if tensors is None else tensors, directory / WEIGHTS)
    return directory


def pair(rank: int = 4, module: str = Q, shape: tuple[int, int] = (128, 32)) -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{module}"
    return {f"{prefix}.lora_A.weight": torch.ones(rank, shape[1]), f"{prefix}.lora_B.weight": torch.ones(shape[0], rank)}


def test_an_adapter_of_some_linears_is_read(tmp_path: Path) -> None:
    tensors = pair() | pair(module="model.layers.1.mlp.down_proj", shape=(32, 128))
    files = inspect(write(tmp_path / "a", tensors=tensors, task_type="CAUSAL_LM", rank_pattern={}), BASE)
    assert (files.rank, files.scale, dict(files.modules)) == (4, 2.0, BASE)
    assert files.num_parameters == 4 * (128 + 32) * 2
    assert inspect(write(tmp_path / "b", use_rslora=True), BASE).scale == 4.0
    assert content_digest(tmp_path / "a") != content_digest(tmp_path / "b")


def test_linears_of_a_base_are_found_by_its_headers(tmp_path: Path) -> None:
    shapes = base_shapes(build("llama", tmp_path / "base"))
    assert len(shapes) == 2 * 7
    assert shapes["model.layers.1.mlp.down_proj"] == (32, 128)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"r": 0}, "r must be"),
        ({"r": MAX_RANK + 1}, "r must be"),
        ({"r": 10**30}, "r must be"),
        ({"r": True}, "r must be"),
        ({"r": 4.0}, "r must be"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"bias": "all"}, "bias"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"a_switch_of_next_year": 1}, "a_switch_of_next_year"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["../../etc/passwd"]}, "passwd"),
        ({"target_modules": [1]}, "list of names"),
    ],
)
def test_what_would_change_the_meaning_is_refused_by_name(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelNotServable, match=reason):
        inspect(write(tmp_path / "a", **config), BASE)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (pair(rank=8), "shape"),
        (pair(shape=(128, 64)), "shape"),
        (pair(shape=(64, 32)), "shape"),
        (pair(module="model.layers.7.self_attn.q_proj"), "another model"),
        (pair(module="../../model.layers.0.self_attn.q_proj"), "no lora_A"),
        ({}, "no tensor"),
        ({"base_model.model.lm_head.weight": torch.ones(2, 2)}, "no lora_A"),
        (pair() | {f"base_model.model.{Q}.lora_magnitude_vector.weight": torch.ones(128)}, "magnitude"),
        (pair() | {f"base_model.model.{Q}.lora_embedding_A": torch.ones(2)}, "embedding"),
        ({name: tensor.to(torch.int8) for name, tensor in pair().items()}, "I8"),
        (dict(list(pair().items())[:1]), "only one"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], reason: str) -> None:
    with pytest.raises(ModelNotServable, match=reason):
        inspect(write(tmp_path / "a", tensors=tensors), BASE)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path / "ran").touch, ()

    directory = write(tmp_path / "a")
    (directory / WEIGHTS).unlink()
    for name in ("adapter_model.bin", WEIGHTS):
        (directory / name).write_bytes(pickle.dumps(Attack()))
        with pytest.raises(ModelNotServable):
            inspect(directory, BASE)
    assert not (tmp_path / "ran").exists()


def truncated(data: bytes) -> bytes:
    return data[:-5]


def extended(data: bytes) -> bytes:
    return data + b"\0" * 8


def headless(data: bytes) -> bytes:
    return b"\xff" * 8 + data[8:]


@pytest.mark.parametrize("spoil", [truncated, extended, headless, lambda data: b"", lambda data: data[:7]])
def test_a_damaged_file_is_refused(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    directory = write(tmp_path / "a")
    (directory / WEIGHTS).write_bytes(spoil((directory / WEIGHTS).read_bytes()))
    with pytest.raises(ModelNotServable):
        inspect(directory, BASE)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"r": NaN}', "[" * 100_000, '"LORA"', "\x00"])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    directory = write(tmp_path / "a")
    (directory / CONFIG).write_text(text)
    with pytest.raises(ModelNotServable):
        inspect(directory, BASE)


def test_missing_files_and_a_base_without_linears_are_told(tmp_path: Path) -> None:
    directory = write(tmp_path / "a")
    with pytest.raises(ModelNotServable, match="linears"):
        inspect(directory, {})
    (directory / CONFIG).unlink()
    with pytest.raises(ModelNotServable, match=CONFIG):
        inspect(directory, BASE)
    with pytest.raises(ModelNotServable):
        inspect(tmp_path / "nowhere", BASE)


def test_numbers_that_are_not_finite_are_found(tmp_path: Path) -> None:
    tensors = pair()
    check_numbers(inspect(write(tmp_path / "a", tensors=tensors), BASE))
    tensors[f"base_model.model.{Q}.lora_B.weight"][5, 1] = float("-inf")
    with pytest.raises(ModelNotServable, match="lora_B"):
        check_numbers(inspect(write(tmp_path / "b", tensors=tensors), BASE))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["peft_type", "r", "lora_alpha", "bias", "target_modules", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern"]


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=12), json_values, max_size=4), st.binary(max_size=200))
def test_whatever_is_in_the_files_the_answer_is_an_adapter_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any], data: bytes
) -> None:
    directory = write(tmp_path_factory.mktemp("any"), **config)
    spoilt = directory.with_name(directory.name + "-spoilt")
    shutil.copytree(directory, spoilt)
    (spoilt / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:100] + data)
    for one in (directory, spoilt):
        try:
            found = inspect(one, BASE)
        except ModelNotServable:
            continue
        assert 1 <= found.rank <= MAX_RANK
        assert one is directory


@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_of_an_adapter_are_the_adapter_of_the_parts(ranks: int) -> None:
    """Outputs cut: parts of the whole, one under the other. Inputs cut: parts that add up to it."""
    generator = torch.Generator().manual_seed(0)
    a, b, x = (torch.randn(*shape, generator=generator) for shape in ((4, 12), (24, 4), (5, 12)))
    whole = x @ a.T @ b.T
    rows = [slice(24 * rank // ranks, 24 * (rank + 1) // ranks) for rank in range(ranks)]
    columns = [slice(12 * rank // ranks, 12 * (rank + 1) // ranks) for rank in range(ranks)]
    stacked, added = [], torch.zeros_like(whole)
    for own in rows:
        size = own.stop - own.start
        part_a, part_b = cut_pair(a, b, Cut((24, 12), (size, 12), (((own, slice(0, 12)), (slice(0, size), slice(0, 12))),)))
        stacked.append(x @ part_a.T @ part_b.T)
    for own in columns:
        size = own.stop - own.start
        part_a, part_b = cut_pair(a, b, Cut((24, 12), (24, size), (((slice(0, 24), own), (slice(0, 24), slice(0, size))),)))
        added += x[:, own] @ part_a.T @ part_b.T
    torch.testing.assert_close(torch.cat(stacked, 1), whole)
    torch.testing.assert_close(added, whole)


def test_the_files_of_another_adapter_have_another_digest(tmp_path: Path) -> None:
    one = write(tmp_path / "a")
    tensors = load_file(one / WEIGHTS)
    tensors[f"base_model.model.{Q}.lora_A.weight"][0, 0] = 2
    assert content_digest(one) != content_digest(write(tmp_path / "b", tensors=tensors))
    assert content_digest(one) == content_digest(write(tmp_path / "c"))
