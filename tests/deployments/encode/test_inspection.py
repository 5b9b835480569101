"""What is taken for an encoder, what is refused, and what a directory's own files decide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ModelNotServable
from deployments.encode.inspection import EncoderInfo, inspect, is_encoder
from deployments.engine.model_config import read_json
from tests.deployments.encode.encoders import build, build_classifier, write


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    for path in original.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(original)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path


def admitted(directory: Path, **more: Any) -> EncoderInfo:
    return inspect(directory, **{"tp": 1, "dtype": "float32", **more})


def changed(path: Path, **more: Any) -> None:
    write(path, read_json(path) | more)


def test_facts_come_from_the_directory(directory: Path) -> None:
    info = admitted(directory)
    assert is_encoder(directory)
    assert (info.task, info.poolings, info.normalised, info.max_tokens) == ("embed", ("mean",), True, 48)
    assert admitted(directory, max_model_len=64).max_tokens == 64


def test_a_classifier_knows_its_labels(tmp_path: Path) -> None:
    info = admitted(build_classifier("distilbert", tmp_path, labels=3))
    assert (info.task, info.labels) == ("classify", ("label 0", "label 1", "label 2"))


def test_language_models_are_no_encoders(tmp_path: Path) -> None:
    write(tmp_path / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    assert not is_encoder(tmp_path)
    write(tmp_path / "modules.json", [])
    assert is_encoder(tmp_path)
    with pytest.raises(ModelNotServable, match=r"'llama' can't be served"):
        admitted(tmp_path)


def test_older_pooling_files_are_read_as_sentence_transformers_reads_them(directory: Path) -> None:
    write(directory / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True})
    assert admitted(directory).poolings == ("cls", "mean")


def test_prompts_and_lengths_to_cut_to(directory: Path) -> None:
    write(
        directory / "config_sentence_transformers.json",
        {"prompts": {"query": "query: "}, "default_prompt_name": "query", "matryoshka_dimensions": [32, 16]},
    )
    info = admitted(directory)
    assert (info.prompts, info.default_prompt, info.matryoshka) == ((("query", "query: "),), "query", (16, 32))


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no pooling": (lambda d: (d / "modules.json").unlink(), "doesn't say how"),
    "no pooling config": (lambda d: (d / "1_Pooling" / "config.json").unlink(), "1_Pooling/config.json is missing"),
    "weighted": (lambda d: write(d / "1_Pooling" / "config.json", {"pooling_mode": "weightedmean"}), "weightedmean"),
    "prompt left out": (lambda d: changed(d / "1_Pooling" / "config.json", include_prompt=False), "include_prompt"),
    "unknown module": (
        lambda d: write(
            d / "modules.json", [{"type": f"x.{kind}", "path": kind[:0]} for kind in ("Transformer", "Pooling", "CNN")]
        ),
        "'CNN' is not supported",
    ),
    "a folder outside": (
        lambda d: write(d / "modules.json", [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "../x"}]),
        "no folder of this directory",
    ),
    "remote code": (lambda d: changed(d / "config.json", auto_map={"AutoModel": "x.y"}), "auto_map"),
    "other code": (lambda d: changed(d / "config.json", model_type="nomic_bert"), "can't be served"),
    "pickle": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pickled weights"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json"),
    "manhattan": (lambda d: write(d / "config_sentence_transformers.json", {"similarity_fn_name": "manhattan"}), "manhattan"),
    "truncated weights": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]),
        "truncated",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_can_not_be_followed_is_refused_with_what_to_change(case: str, directory: Path) -> None:
    change, words = REFUSALS[case]
    change(directory)
    with pytest.raises(ModelNotServable, match=words):
        admitted(directory)


@pytest.mark.parametrize(
    ("more", "words"), [({"tp": 2}, "tp=1"), ({"dtype": "float16"}, "float32 or bfloat16"), ({"max_model_len": 65}, "64")]
)
def test_how_it_is_asked_for_can_be_wrong_too(more: dict[str, Any], words: str, directory: Path) -> None:
    with pytest.raises(ModelNotServable, match=words):
        admitted(directory, **more)
