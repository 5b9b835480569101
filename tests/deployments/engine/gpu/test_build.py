"""The way from a loaded model to a runner that may serve, on the CPU with a GPU's numbers given to it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.errors import ModelNotServable
from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine.attention import CPU
from deployments.engine.checkpoint import inspect
from deployments.engine.engine import Engine
from deployments.engine.gpu import build
from deployments.engine.gpu.runner import DeviceRunner
from deployments.engine.gpu.static import StaticDecode, uncaptured
from deployments.engine.messages import Request
from deployments.engine.progress import Progress
from deployments.engine.quantization import FORMATS
from deployments.engine.quantized_linear import quantize_model
from deployments.engine.rendezvous import Rendezvous
from deployments.engine.runner import Runner, load_model
from deployments.engine.runners import Runners
from deployments.engine.shard_spec import ShardSpec
from tests.deployments.engine.families import build as write_model
from tests.deployments.engine.families import reference
from tests.deployments.engine.gpu import readable

MIB = 1 << 20
BLOCK_BYTES = 2 * 2 * 2 * 32 * 4 * 8
"""Keys and values of eight tokens: two layers, two heads of 32 float32."""
PROMPT = [5, 80, 7, 13, 200]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(autouse=True)
def _a_gpu_of_100_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which 30 are taken; a step takes two."""
    peak = iter([2 * MIB] * 9)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: next(peak))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (70 * MIB, 100 * MIB))
    monkeypatch.setattr(build, "Graphs", lambda: uncaptured)
    monkeypatch.setitem(sys.modules, "deployments.engine.gpu.kernel", SimpleNamespace(attend=readable.attend))


def built(directory: Path, *, exactly: int | None = None, quantization: str | None = None, **settings: Any) -> tuple[Any, int]:
    usual = {"block_size": 8, "max_sequences": 80, "max_batch_tokens": 64, "gpu_memory": 0.5, "speculation": 0}
    spec = ShardSpec(
        directory,
        inspect(directory, tp=1, dtype="float32"),
        num_blocks=exactly or 1,
        threads=1,
        settings=EngineSettings(**usual | settings),
        rendezvous=Rendezvous("", 0, 1, 60),
        exactly=exactly is not None,
    )
    model = load_model(directory, "float32")
    if quantization:
        quantize_model(model, quantization)
    return build.gpu_runner(model, replace(spec), CPU, None)


@pytest.mark.parametrize(
    ("settings", "kind", "steps"),
    [({}, StaticDecode, 2), ({"cuda_graphs": False}, DeviceRunner, 1), ({"runner": "torch"}, Runner, 1)],
)
def test_what_steps_leave_of_the_share_becomes_cache(directory: Path, settings: dict[str, Any], kind: type, steps: int) -> None:
    runner, num_blocks = built(directory, **settings)
    assert type(runner) is kind
    assert num_blocks == (70 - 50 - 2 * steps) * MIB // BLOCK_BYTES
    spare = kind is not Runner
    assert (runner.runner if kind is StaticDecode else runner).cache.num_bytes == (num_blocks + spare) * BLOCK_BYTES


@pytest.mark.parametrize("quantization", FORMATS)
def test_weights_in_eight_bits_go_the_same_way(directory: Path, quantization: str) -> None:
    """And may differ from the readable attention by what a rounding carries on."""
    runner, _ = built(directory, quantization=quantization)
    assert type(runner) is StaticDecode
    assert runner.runner.slack > 0


def test_a_shard_takes_its_blocks_from_what_was_planned(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    settings = EngineSettings(block_size=8, max_sequences=2, max_batch_tokens=64, cut_weights_bytes=0)
    spec = ShardSpec(directory, inspect(directory, tp=1, dtype="float32"), 1, 1, settings, Rendezvous("", 0, 1, 60))
    progress = Progress()
    runner, planned = Runners(CPU, None, None, progress).on_gpu(spec)
    assert planned.num_blocks == 2 * 256 // 8
    assert progress.now().source == "model"
    runner.close()


def test_what_is_built_answers(directory: Path) -> None:
    runner, num_blocks = built(directory, exactly=6, max_sequences=2)
    assert num_blocks == 6
    engine = Engine.of(runner.run, num_blocks, EngineSettings(block_size=8, max_sequences=2, speculation=0))
    engine.add(Request(0, PROMPT, Sampling(temperature=0.0), 8, [], seed=0))
    found = []
    while engine.has_work:
        found += [output.token for output in engine.step()]
    assert found == reference(directory, [PROMPT], 8)[0]
    runner.close()


def test_no_more_blocks_than_could_ever_be_used(directory: Path) -> None:
    assert built(directory, max_sequences=2)[1] == 2 * 256 // 8


def test_a_full_gpu_is_refused(directory: Path) -> None:
    with pytest.raises(ModelNotServable, match=r"leaves no room .* 100 MiB, 70 of them free"):
        built(directory, gpu_memory=0.3)


def test_a_kernel_that_gives_other_logits_is_found_out(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: Any, step: Any) -> torch.Tensor:
        return readable.attend(queries, keys, values, call, step) * 1.1

    monkeypatch.setitem(sys.modules, "deployments.engine.gpu.kernel", SimpleNamespace(attend=wrong))
    with pytest.raises(ModelNotServable, match=r"attention kernel gives other logits .*engine\.runner=torch"):
        built(directory)


def test_graphs_that_are_demanded_and_can_not_be_are_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "why_not", lambda _: "it is Tuesday")
    assert type(built(directory)[0]) is DeviceRunner
    with pytest.raises(ModelNotServable, match=r"engine\.cuda_graphs=true, but it is Tuesday"):
        built(directory, cuda_graphs=True)
