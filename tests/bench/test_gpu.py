"""What the GPU benchmark computes from what it measures, and its loop around something that needs no GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench.gpu
from bench.gpu import (
    MODELS,
    Case,
    Limits,
    Prompts,
    Run,
    build,
    decode,
    decode_bound_s,
    engine,
    extrapolated,
    first_token,
    layers_that_fit,
    measure,
    measured_limits,
    weights_of,
)
from cluster.settings import EngineSettings
from deployments.engine.attention import CPU
from deployments.engine.gpu.static import uncaptured
from tests.deployments.engine.arithmetic import VOCABULARY, count_up
from tests.deployments.engine.gpu import readable

TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LIMITS = Limits(bandwidth=3e12, matrix=8e14)


def test_weights_of_a_step_are_the_models_less_its_embeddings_and_norms() -> None:
    model = build(TINY, CPU)
    looked_up = sum(p.numel() for name, p in model.named_parameters() if "norm" in name or "embed" in name)
    found = weights_of(TINY)
    assert found.step_bytes == 2 * (sum(p.numel() for p in model.parameters()) - looked_up)
    assert found.kv_bytes_per_token == 2 * 3 * 2 * 8 * 2
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_geometries_are_those_of_their_names() -> None:
    sizes = {name: weights_of(spec).step_bytes / 2e9 for name, spec in MODELS.items()}
    assert sizes == pytest.approx({"0.5B": 0.49, "8B": 7.5, "70B": 69.5}, rel=0.02)


def test_one_sequence_is_bound_by_reading_and_many_by_multiplying() -> None:
    weights = weights_of(MODELS["8B"])
    assert decode_bound_s(weights, 1, 0, LIMITS) == weights.step_bytes / LIMITS.bandwidth
    assert decode_bound_s(weights, 1, 8000, LIMITS) > decode_bound_s(weights, 1, 0, LIMITS)
    assert decode_bound_s(weights, 4096, 0, LIMITS) == 4096 * weights.token_flops / LIMITS.matrix


def test_missing_layers_take_as_long_as_those_that_are_there() -> None:
    assert extrapolated(1 + 10 * 0.5, 1 + 20 * 0.5, (10, 20), 80) == pytest.approx(1 + 80 * 0.5)
    assert layers_that_fit(MODELS["8B"], 80 << 30) == 32
    assert 25 < layers_that_fit(MODELS["70B"], 80 << 30) < 40
    assert layers_that_fit(MODELS["70B"], 1) == 2


def test_the_loop_times_steps_in_which_all_decode() -> None:
    settings = EngineSettings(max_sequences=8, max_batch_tokens=64)
    made = engine(count_up, 64, settings)
    assert decode(made, 8, VOCABULARY, 20, 30) > 0
    assert first_token(made, 50, VOCABULARY, times=2) > 0
    assert not made.has_work
    assert made.stats().blocks_used == 0


def test_limits_are_measured() -> None:
    found = measured_limits(CPU, size=64, copied=1 << 16)
    assert found.bandwidth > 0
    assert found.matrix > 0


@pytest.mark.parametrize("fits", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_model_that_does_not_fit_is_measured_in_part(fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PROMPT": 16, "NEW": 12, "LONG": 32, "MODELS": {"tiny": TINY}}.items():
        monkeypatch.setattr(bench.gpu, name, value)
    monkeypatch.setattr(bench.gpu, "layers_that_fit", lambda *_: 3 if fits else 2)
    monkeypatch.setattr(bench.gpu, "peers", lambda *_, compiled: {"transformers": 5.0} | ({"compiled": 6.0} if compiled else {}))
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name, number in {"memory_allocated": 0, "max_memory_allocated": 0, "mem_get_info": (2 << 20, 2 << 20)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, number=number: number)
    monkeypatch.setattr("deployments.engine.gpu.build.Graphs", lambda: uncaptured)
    monkeypatch.setitem(sys.modules, "deployments.engine.gpu.kernel", SimpleNamespace(attend=readable.attend))
    (tmp_path / "README.md").write_text("<!-- gpu: start -->\n<!-- gpu: end -->\n")
    run = Run(LIMITS, {"name": "none"}, "python -m bench.gpu", tmp_path, [], [])
    measure(run, "tiny", [1, 3], CPU, lambda: 1000.0)
    assert [(case.layers, case.sequences, case.graphs) for case in run.cases] == (
        [(3, 1, True), (3, 3, True), (3, 1, False), (3, 3, False)] if fits else [(2, 1, True), (2, 3, True)]
    )
    assert all(case.tokens_per_s * case.step_ms == pytest.approx(1000 * case.sequences) for case in run.cases)
    assert [len(case.peers) for case in run.cases] == ([2, 1, 0, 0] if fits else [0, 0])
    assert len(run.prompts) == fits


def test_results_are_there_after_each_case(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("<!-- gpu: start -->\n<!-- gpu: end -->\n")
    run = Run(LIMITS, {"name": "a GPU"}, "python -m bench.gpu", tmp_path, [], [])
    run.write()
    run.cases.append(Case("8B", 32, 32, 8, True, 900.0, 8.9, 0.6, {"transformers": 300.0}))
    run.cases.append(Case("70B", 36, 80, 1, True, 15.0, 66.7, 0.7, {}))
    run.prompts.append(Prompts("8B", 32, 40_000.0, 20.0, 0.5))
    run.write()
    content = json.loads((tmp_path / "results" / "gpu.json").read_text())
    assert [row["ratio"] for row in content["rows"]] == [3.0, None]
    assert content["gpu"]["bandwidth"] == 3e12
    readme = (tmp_path / "README.md").read_text()
    assert "| 70B (36 of 80 layers measured) | 1 | yes | 15 | 66.70 | 70% |  |" in readme
    assert "a GPU: 3.00 TB/s copied, 800 TFLOP/s multiplied" in readme
