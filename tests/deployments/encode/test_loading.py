"""The engine against transformers: six families, embeddings and labels, through torch and through the compiled encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from cluster.errors import ModelNotServable
from deployments.encode import loading
from deployments.encode.inspection import inspect
from deployments.encode.loading import Model, load, padded_groups, pool
from deployments.encode.row import Row, starts_of
from tests.deployments.encode.encoders import FAMILIES, build, build_classifier

NATIVE = tuple(family for family in FAMILIES if family != "modernbert")
LENGTHS = (1, 2, 3, 7, 12, 13, 16, 31, 32, 33, 40, 48)


def rows(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [Row(rng.integers(2, 20, length).tolist(), (np.arange(length) > length // 2).tolist()) for length in lengths]


def loaded(directory: Path, cache: Path, *, native: bool | None, dtype: str = "float32") -> Model:
    return load(directory, inspect(directory, tp=1, dtype=dtype), threads=2, native=native, cache=cache)


def reference(directory: Path, given: list[Row], *, classify: bool = False) -> Any:
    """One row at a time, no padding, no batch: mean of the hidden states, or logits."""
    kind = transformers.AutoModelForSequenceClassification if classify else transformers.AutoModel
    model = kind.from_pretrained(directory).eval()
    results = []
    for row in given:
        types = {"token_type_ids": torch.tensor([row.types.tolist()])} if getattr(model.config, "type_vocab_size", 0) > 1 else {}
        with torch.inference_mode():
            answer = model(input_ids=torch.tensor([row.ids.tolist()]), **types)
        results.append(answer.logits[0] if classify else torch.nn.functional.normalize(answer.last_hidden_state[0].mean(0), dim=0))
    return torch.stack(results).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_transformers(family: str, tmp_path: Path, cache: Path) -> None:
    build(family, tmp_path)
    expected = reference(tmp_path, rows())
    for native in (False, True) if family in NATIVE else (False,):
        np.testing.assert_allclose(loaded(tmp_path, cache, native=native).run(rows()), expected, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, tmp_path: Path, cache: Path) -> None:
    build_classifier(family, tmp_path)
    expected = reference(tmp_path, rows(), classify=True)
    for native in (False, True) if family in NATIVE else (False,):
        np.testing.assert_allclose(loaded(tmp_path, cache, native=native).run(rows()), expected, atol=1e-4)


def test_batch_mates_move_a_row_by_no_more_than_noise(tmp_path: Path, cache: Path) -> None:
    build("bert", tmp_path)
    for native, bound in ((False, 1e-5), (True, 1e-6)):
        model = loaded(tmp_path, cache, native=native)
        together = model.run(rows())
        alone = np.concatenate([model.run([row]) for row in rows()])
        many = model.run([row for _ in range(40) for row in rows()])[-len(LENGTHS) :]
        assert np.abs(together - alone).max() < bound
        assert np.abs(together - many).max() < bound


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_bfloat16_is_near(family: str, tmp_path: Path, cache: Path) -> None:
    build(family, tmp_path)
    exact = loaded(tmp_path, cache, native=True).run(rows())
    for native in (False, True):
        near = loaded(tmp_path, cache, native=native, dtype="bfloat16").run(rows())
        assert (near * exact).sum(axis=1).min() > 0.999


def test_padding_among_the_tokens_keeps_the_positions_of_transformers(tmp_path: Path, cache: Path) -> None:
    build("roberta", tmp_path)
    given = [Row([0, 1, 5, 1, 6, 2])]
    found = [loaded(tmp_path, cache, native=native).run(given) for native in (False, True)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_weights_that_are_missing_are_an_error_and_never_random(tmp_path: Path, cache: Path) -> None:
    build("bert", tmp_path)
    found = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(found.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ModelNotServable, match="the weights lack"):
        loaded(tmp_path, cache, native=None)


def test_a_disproved_encoder_is_not_used(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("bert", tmp_path)
    monkeypatch.setitem(loading.TOLERANCE, "float32", 0.0)
    model = loaded(tmp_path, cache, native=None)
    assert isinstance(model, loading.ModuleModel)
    np.testing.assert_allclose(model.run(rows()), reference(tmp_path, rows()), atol=2e-5)
    with pytest.raises(ModelNotServable, match="other numbers"):
        loaded(tmp_path, cache, native=True)


def test_padded_groups_hold_every_row_once_within_the_budget() -> None:
    lengths = np.random.default_rng(3).integers(1, 300, 500).tolist()
    groups = padded_groups(lengths, 1024)
    assert sorted(place for group in groups for place in group) == list(range(500))
    assert all(len(group) == 1 or len(group) * max(lengths[place] for place in group) <= 1024 for group in groups)
    assert sum(len(group) * max(lengths[place] for place in group) for group in groups) < 1.05 * sum(lengths)


@pytest.mark.parametrize("mode", ["cls", "mean", "max", "mean_sqrt_len_tokens", "lasttoken"])
def test_pooling_is_that_of_sentence_transformers(mode: str) -> None:
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling

    given, rng = rows(), np.random.default_rng(5)
    states = rng.normal(size=(sum(LENGTHS), 8)).astype(np.float32)
    padded, mask = torch.zeros(len(given), max(LENGTHS), 8), torch.zeros(len(given), max(LENGTHS), dtype=torch.long)
    for place, (start, row) in enumerate(zip(starts_of(given), given, strict=False)):
        padded[place, : len(row)] = torch.from_numpy(states[start : start + len(row)])
        mask[place, : len(row)] = 1
    expected = Pooling(8, pooling_mode=mode)({"token_embeddings": padded, "attention_mask": mask})["sentence_embedding"]
    np.testing.assert_allclose(pool(mode, states, starts_of(given)), expected.numpy(), atol=1e-5)  # type: ignore[arg-type]
