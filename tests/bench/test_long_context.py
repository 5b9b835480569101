"""The benchmark of long contexts: its arithmetic, and that an engine is measured at every length."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from bench import models
from bench.long_context import Measurement, draw, kv_bytes_per_token, measure, rows, table
from deployments.engine.checkpoint import inspect
from tests.bench.test_engine import echo

OURS = Measurement("mmaas tp=1", "S", 8192, True, 1000.0, 50.0, 3 << 20, 1 << 20, 2 << 20)
OTHER = replace(OURS, engine="other", ours=False, prompt_tokens_per_s=2000.0, tokens_per_s=25.0)


def test_an_engine_is_measured_at_every_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "directory", lambda name, **options: tmp_path)
    options = argparse.Namespace(threads=1, tokens=9, repeats=2)
    measured, versions = measure(echo(tmp_path), "S", [16, 64], options)
    assert [m.context for m in measured] == [16, 64]
    assert [m.prompt_tokens_per_s for m in measured] == [16.0, 64.0]  # the engine says that a first token takes a second
    assert [m.tokens_per_s for m in measured] == [4.0, 4.0]  # and the 8 others two
    assert all(0 <= m.grown_bytes < m.peak_rss_bytes for m in measured)
    assert versions.keys() == {"pytest"}


def test_ours_is_compared_at_the_same_length_in_both_speeds() -> None:
    other_length = replace(OTHER, context=512, tokens_per_s=1.0)
    assert [(row.model, row.peer, row.ratio) for row in rows([OURS, OTHER, other_length])] == [
        ("S: prompt of 8192", "other", 0.5),
        ("S: output after 8192", "other", 2.0),
    ]
    assert [row.ratio for row in rows([OURS])] == [None, None]


def test_the_table_is_by_length_and_in_mebibytes() -> None:
    lines = table([OURS, OTHER, replace(OTHER, context=512)]).lines
    assert [(line[1], line[2]) for line in lines] == [("512", "other"), ("8192", "mmaas tp=1"), ("8192", "other")]
    assert lines[1][5:] == ["2", "1", "3"]


def test_keys_and_values_are_what_the_engine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = models.MODELS["S"] | {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    monkeypatch.setitem(models.MODELS, "S", tiny)
    monkeypatch.setattr(models, "_standard_library", lambda: iter(["def f(x):\n    return x + 1\n" * 50]))
    info = inspect(models.directory("S", tmp_path, context=8448), tp=1, dtype="bfloat16")
    assert info.max_model_len == 8448
    assert kv_bytes_per_token("S") == info.kv_bytes_per_token


def test_the_plot_is_of_one_model(tmp_path: Path) -> None:
    draw(tmp_path / "x.svg", "S", [OURS, OTHER, replace(OTHER, model="M", engine="elsewhere")])
    drawn = (tmp_path / "x.svg").read_text()
    assert "other" in drawn
    assert "elsewhere" not in drawn
