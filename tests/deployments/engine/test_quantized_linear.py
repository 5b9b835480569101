"""Models whose linear modules hold eight bits: what is taken and what stays, as they are read or in place, on one rank and two."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from cluster.errors import ModelNotServable
from cluster.settings import EngineSettings
from cluster.types import Deployment, Sampling
from deployments.engine import copies
from deployments.engine.census import take
from deployments.engine.checkpoint import admit, inspect
from deployments.engine.load import load
from deployments.engine.local import LocalEngine
from deployments.engine.progress import Progress
from deployments.engine.quantization import FORMATS, dequantize
from deployments.engine.quantized_linear import QuantizedLinear, quantize_model
from deployments.engine.runner import load_model
from tests.deployments.engine import tiny
from tests.deployments.engine.families import VOCABULARY, build
from tests.deployments.engine.ranks import run_on_two_ranks

SMALL = EngineSettings(kv_cache_bytes=1 << 22, max_batch_tokens=64, max_sequences=8, threads=1, block_size=16, speculation=0)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: build(family, root / family) for family in ("llama", "gemma2", "qwen2", "gpt_neox")}


@pytest.mark.parametrize("form", FORMATS)
def test_every_linear_but_the_output_is_quantised_and_nothing_else(directories: dict[str, Path], form: str) -> None:
    plain, model = (load_model(directories["qwen2"], "float32") for _ in range(2))
    quantize_model(model, form)
    for name, module in plain.named_modules():
        now = model.get_submodule(name)
        if isinstance(module, nn.Linear) and name != "lm_head":
            assert isinstance(now, QuantizedLinear)
            assert now.weight.dtype is FORMATS[form].dtype
            widest = module.weight.abs().amax(1, keepdim=True)
            assert ((dequantize(now.weight, now.scales) - module.weight).abs() <= widest / (250 if form == "int8" else 28)).all()
            assert module.bias is None or torch.equal(now.bias, module.bias)
        else:
            assert type(now) is type(module)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)


@pytest.mark.parametrize("form", FORMATS)
def test_logits_stay_near_those_of_the_whole_numbers(directories: dict[str, Path], form: str) -> None:
    """Torch alone, which is how any family that the decoder doesn't know is served, and how fp8 is simulated."""
    ids = torch.arange(40)[None] * 7 % VOCABULARY
    for family in ("llama", "gpt_neox"):
        plain, model = (load_model(directories[family], "float32") for _ in range(2))
        for one in (plain, model):
            one.set_attn_implementation("eager")
        quantize_model(model, form)
        with torch.inference_mode():
            exact, found = plain(ids).logits, model(ids).logits
        error = float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())
        assert 0 < error < (0.1 if form == "int8" else 0.3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_quantised_as_they_are_read_are_those_quantised_later(directories: dict[str, Path], dtype: str) -> None:
    later = load_model(directories["llama"], dtype)
    quantize_model(later, "int8")
    read = load(directories["llama"], dtype, None, EngineSettings(cut_weights_bytes=0), Progress(), "int8")
    assert read.state_dict().keys() == later.state_dict().keys()
    for name, tensor in later.state_dict().items():
        assert tensor.dtype == read.state_dict()[name].dtype
        assert torch.equal(tensor, read.state_dict()[name])


def test_the_second_start_reads_eight_bits_from_the_copy(
    directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "WORTH_BYTES", 0)
    settings, progress = EngineSettings(cache=tmp_path), [Progress() for _ in range(3)]
    first, second = (load(directories["llama"], "bfloat16", None, settings, one, "int8").state_dict() for one in progress[:2])
    load(directories["llama"], "bfloat16", None, settings, progress[2])
    assert [one.now().source for one in progress] == ["model", "copy", "model"], "what isn't quantised has a copy of its own"
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)
    assert progress[1].now().bytes_total < progress[0].now().bytes_total / 2


def test_weights_that_are_no_numbers_are_refused_by_name(directories: dict[str, Path]) -> None:
    model = load_model(directories["llama"], "float32")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ModelNotServable, match=r"model\.layers\.1\.mlp\.up_proj"):
        quantize_model(model, "int8")


def test_a_model_whose_matrices_are_no_linear_modules_is_refused_by_name() -> None:
    with pytest.raises(ModelNotServable, match=r"can't be quantised: .*experts"):
        quantize_model(tiny.build("mixtral"), "int8")


def test_nonsense_is_refused_before_anything_is_loaded(directories: dict[str, Path]) -> None:
    with pytest.raises(ModelNotServable, match="int8 or fp8"):
        inspect(directories["llama"], tp=1, dtype="bfloat16", quantization="int3")  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_fp8_is_refused_where_no_gpu_is_promised(directories: dict[str, Path], device: str) -> None:
    with pytest.raises(ModelNotServable, match=r"engine\.device=cuda; use int8"):
        admit(Deployment("m", "/m", quantization="fp8"), directories["llama"], device)
    assert admit(Deployment("m", "/m", quantization="int8"), directories["llama"], device).quantization == "int8"


def test_fp8_is_admitted_for_gpus_and_never_simulated_in_their_place(directories: dict[str, Path]) -> None:
    assert admit(Deployment("m", "/m", quantization="fp8"), directories["llama"], "cuda").quantization == "fp8"
    with pytest.raises(ModelNotServable, match="use int8"):
        LocalEngine(directories["llama"], settings=SMALL.model_copy(update={"device": "cpu"}), quantization="fp8")


def test_a_census_knows_what_will_be_quantised(directories: dict[str, Path]) -> None:
    for directory in directories.values():
        model = load_model(directory, "float32")
        counted = {parameter.name for parameter in take(directory).parameters if parameter.is_quantized}
        quantize_model(model, "int8")
        assert counted == {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def prompts() -> list[list[int]]:
    numbers = random.Random(0)
    return [[numbers.randrange(1, VOCABULARY) for _ in range(length)] for length in (3, 17, 40)]


def test_torch_serves_int8_where_the_decoder_cannot(directories: dict[str, Path]) -> None:
    with LocalEngine(directories["gpt_neox"], settings=SMALL, quantization="int8") as engine:
        results = engine.generate(prompts(), Sampling(temperature=0.0, max_tokens=4))
        assert [len(result.token_ids) for result in results] == [4, 4, 4]
        assert engine.info.quantization == "int8"


@pytest.mark.slow
@pytest.mark.parametrize("native", [True, False])
def test_two_ranks_answer_nearly_as_one(directories: dict[str, Path], native: bool) -> None:
    """Where inputs are cut, each rank has scales of its own, so the numbers are not the same. With `native` each load has also
    been proven: decoder against torch, on both ranks."""
    families = {family: directories[family] for family in (("llama", "gemma2", "qwen2") if native else ("llama", "gpt_neox"))}
    settings = SMALL.model_copy(update={"native": native})
    reports = run_on_two_ranks(families, prompts(), settings, num_blocks=24, quantization="int8")
    for family, directory in families.items():
        with LocalEngine(directory, settings=settings, quantization="int8") as one:
            expected = one.generate(prompts(), Sampling(temperature=0.0, max_tokens=12, logprobs=0))
            assert reports[family].weight_bytes < 0.8 * one.shard.runner.weight_bytes
        for result, logprobs, tokens in zip(expected, reports[family].logprobs, reports[family].tokens, strict=True):
            assert tokens[0] == result.token_ids[0]
            assert abs(logprobs[0] - result.logprobs[0]) < 0.5
