"""Classifiers, cross-encoders and cuts on tiny models, against transformers' own answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from cluster.errors import InvalidRequest, ModelNotSupported
from cluster.types import Encode
from deployments.encode.inspection import inspect
from deployments.encode.loading import load
from deployments.encode.row import Floats
from deployments.encode.tasks import Tasks, unit
from tests.deployments.encode.encoders import FAMILIES, build, build_classifier, write

TEXTS = ("the red fox", "split text into words", "a blue cat jumps over the lazy dog")


def answered(directory: Path, cache: Path, call: Encode) -> Floats:
    info = inspect(directory, tp=1, dtype="float32")
    model, tasks = load(directory, info, threads=2, native=None, cache=cache), Tasks(directory, info)
    tasks.check(call, model.width)
    return tasks.finish(call, model.run(tasks.rows(call)))


def logits(directory: Path, texts: list[Any]) -> torch.Tensor:
    """transformers' own way: tokenizer, padding and model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=64, return_token_type_ids=True, return_tensors="pt")
    if getattr(model.config, "type_vocab_size", 0) < 2:
        inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        return model(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_are_those_of_transformers(family: str, tmp_path: Path, cache: Path) -> None:
    build_classifier(family, tmp_path)
    found = answered(tmp_path, cache, Encode("r", "t", "classify", texts=TEXTS))
    np.testing.assert_allclose(found, logits(tmp_path, list(TEXTS)).softmax(-1).numpy(), atol=1e-5)


def test_labels_that_exclude_nothing_have_probabilities_of_their_own(tmp_path: Path, cache: Path) -> None:
    build_classifier("bert", tmp_path, problem_type="multi_label_classification")
    found = answered(tmp_path, cache, Encode("r", "t", "classify", texts=TEXTS))
    np.testing.assert_allclose(found, logits(tmp_path, list(TEXTS)).sigmoid().numpy(), atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_a_cross_encoder_scores_pairs(family: str, tmp_path: Path, cache: Path) -> None:
    build_classifier(family, tmp_path, labels=1)
    found = answered(tmp_path, cache, Encode("r", "t", "rerank", texts=TEXTS, query="green house"))
    expected = logits(tmp_path, [("green house", text) for text in TEXTS]).sigmoid().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(found) > 1e-3, "the scores must differ for the test to mean something"


def test_labels_are_no_score(tmp_path: Path, cache: Path) -> None:
    build_classifier("bert", tmp_path, labels=3)
    with pytest.raises(ModelNotSupported, match="3 labels"):
        answered(tmp_path, cache, Encode("r", "t", "rerank", texts=TEXTS, query="x"))
    with pytest.raises(ModelNotSupported, match="/v1/classify"):
        answered(tmp_path, cache, Encode("r", "t", "embed", texts=TEXTS))


def test_dimensions_cut_and_normalise_where_the_model_was_made_for_it(tmp_path: Path, cache: Path) -> None:
    build("bert", tmp_path)
    write(tmp_path / "config_sentence_transformers.json", {"matryoshka_dimensions": [16, 32]})
    whole = answered(tmp_path, cache, Encode("r", "t", "embed", texts=TEXTS))
    cut = answered(tmp_path, cache, Encode("r", "t", "embed", texts=TEXTS, dimensions=16))
    np.testing.assert_allclose(cut, unit(whole[:, :16]), atol=1e-6)
    with pytest.raises(InvalidRequest, match="16, 32 or 64"):
        answered(tmp_path, cache, Encode("r", "t", "embed", texts=TEXTS, dimensions=17))


def test_prompts_go_before_queries_and_documents(tmp_path: Path, cache: Path) -> None:
    build("mpnet", tmp_path)
    plain = answered(tmp_path, cache, Encode("r", "t", "embed", texts=("red fox", "blue cat")))
    write(tmp_path / "config_sentence_transformers.json", {"prompts": {"query": "red ", "document": "blue "}})
    named = answered(tmp_path, cache, Encode("r", "t", "embed", texts=("fox",), prompt_name="query"))
    np.testing.assert_allclose(named[0], plain[0], atol=1e-6)
    scores = answered(tmp_path, cache, Encode("r", "t", "rerank", texts=("cat",), query="fox"))
    np.testing.assert_allclose(scores[0, 0], plain[0] @ plain[1], atol=1e-5)


def test_a_dense_layer_and_several_poolings_are_those_of_sentence_transformers(tmp_path: Path, cache: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.dense import Dense

    build("roberta", tmp_path / "plain", pooling=["cls", "mean", "max"])
    reference = SentenceTransformer(str(tmp_path / "plain"), device="cpu")
    torch.manual_seed(3)
    reference = SentenceTransformer(modules=[reference[0], reference[1], Dense(192, 24)], device="cpu")
    reference.save(str(tmp_path / "saved"))
    found = answered(tmp_path / "saved", cache, Encode("r", "t", "embed", texts=TEXTS))
    np.testing.assert_allclose(found, reference.encode(list(TEXTS)), atol=2e-5)
    assert found.shape == (3, 24)
