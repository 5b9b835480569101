"""The whole engine on a GPU against transformers on the CPU: in float32 every token must be the same."""

from __future__ import annotations

import gc
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import ModelNotServable
from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine.gpu.static import StaticDecode
from deployments.engine.local import LocalEngine
from tests.deployments.engine.families import VOCABULARY, build, reference
from tests.deployments.engine.guesses import Guesses

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi3", "granite", "gpt_neox", "opt"]
WAYS: dict[str, dict[str, Any]] = {
    "graphs": {"cuda_graphs": True},
    "no graphs": {"cuda_graphs": False},
    "torch": {"runner": "torch"},
}
GREEDY = Sampling(temperature=0.0, max_tokens=12)
SAMPLED = Sampling(temperature=0.9, top_p=0.9, top_k=30, max_tokens=12, seed=5, repetition_penalty=1.1)
FEW = 16


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(1, VOCABULARY) for _ in range(length)] for length in (3, 17, 30, 1, 9, 40)]


def settings(**more: Any) -> EngineSettings:
    usual = {"device": "cuda", "block_size": 4, "max_batch_tokens": 256, "max_sequences": 8, "gpu_memory": 0.3, "threads": 1}
    return EngineSettings(**usual | more)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("models")

    @cache
    def made(family: str) -> tuple[Path, list[list[int]]]:
        directory = build(family, root / family)
        return directory, reference(directory, prompts(), 12)

    return made


def tokens(engine: LocalEngine, sampling: Sampling = GREEDY, **options: int) -> list[list[int]]:
    return [answer.token_ids for answer in engine.generate(prompts(), sampling, **options)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(models: Any, family: str, way: str) -> None:
    directory, expected = models(family)
    with LocalEngine(directory, settings=settings(**WAYS[way])) as engine:
        assert engine.shard.device.type == "cuda"
        assert isinstance(engine.shard.runner, StaticDecode) == (way == "graphs")
        assert tokens(engine) == expected
        assert tokens(engine) == expected, "from the prefix cache"
        assert tokens(engine, concurrency=3) == expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_chunks_preemption_and_guesses_change_no_token(models: Any, family: str, way: str) -> None:
    directory, expected = models(family)
    with LocalEngine(directory, settings=settings(max_batch_tokens=16, **WAYS[way]), blocks=FEW) as engine:
        assert tokens(engine) == expected
        assert engine.engine.stats().preemptions > 0
        engine.engine.speculation = Guesses({(number, 0): answer for number, answer in enumerate(expected)}, vocabulary=VOCABULARY)
        assert tokens(engine) == expected
        assert engine.engine.stats().accepted_tokens > 0
        engine.engine.scheduler.check_integrity()
        assert engine.engine.stats().blocks_used == 0


def test_a_batch_mate_changes_no_sampled_token(models: Any) -> None:
    directory, _ = models("llama")
    with LocalEngine(directory, settings=settings()) as engine:
        together = tokens(engine, SAMPLED)
        assert tokens(engine, SAMPLED, concurrency=1) == together
    with LocalEngine(directory, settings=settings(device="cpu", native=False)) as engine:
        assert tokens(engine, SAMPLED) == together, "the draw is the CPU's"


def test_log_probabilities_are_the_models(models: Any) -> None:
    directory, _ = models("llama")
    asked = Sampling(temperature=0.0, max_tokens=12, logprobs=0)
    found = []
    for device in ("cuda", "cpu"):
        with LocalEngine(directory, settings=settings(device=device, native=False)) as engine:
            found.append([answer.logprobs for answer in engine.generate(prompts(), asked)])
    for there, here in zip(*found, strict=True):
        assert there == pytest.approx(here, abs=1e-3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_is_no_further_from_float32_than_transformers_is(models: Any, family: str, way: str) -> None:
    from transformers import AutoModelForCausalLM

    from deployments.engine.runner import _probe

    directory, _ = models(family)
    prompt = prompts()[-1]

    def theirs(dtype: torch.dtype) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").to("cuda").eval()
        with torch.inference_mode():
            return model(torch.tensor([prompt], device="cuda")).logits[0, -1].float()

    exact = theirs(torch.float32)
    with LocalEngine(directory, dtype="bfloat16", settings=settings(**WAYS[way])) as engine:
        ours = engine.shard.runner.run(_probe(prompt, start=0, table=list(range(1, 11))))[0].float()
    assert (ours - exact).norm() <= 1.25 * (theirs(torch.bfloat16) - exact).norm()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_weights_in_eight_bits_give_what_is_simulated(models: Any, quantization: Any, way: str) -> None:
    """But for roundings that fall the other way; a wrong product or scale is far beyond."""
    from transformers import AutoModelForCausalLM

    from deployments.engine.quantized_linear import quantize_model
    from deployments.engine.runner import _probe

    if quantization == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU doesn't multiply fp8")
    directory, _ = models("llama")
    prompt, simulated = prompts()[-1], AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    quantize_model(simulated, quantization)
    with torch.inference_mode():
        expected = simulated(torch.tensor([prompt])).logits[0, -1]
    with LocalEngine(directory, settings=settings(**WAYS[way]), quantization=quantization) as engine:
        found = engine.shard.runner.run(_probe(prompt, start=0, table=list(range(1, 11))))[0].float().cpu()
        assert [len(answer) for answer in tokens(engine)] == [12] * len(prompts())
    assert (found - expected).norm() <= 0.2 * expected.norm()


def test_the_cache_fills_its_share_and_all_memory_comes_back(models: Any) -> None:
    directory, _ = models("llama")

    def held() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    held()
    before = held()
    free, total = torch.cuda.mem_get_info()
    share = (total - free) / total + 0.05
    with LocalEngine(directory, settings=settings(gpu_memory=share, max_sequences=4096)) as engine:
        tokens(engine)
        cache = engine.shard.runner.runner.cache.num_bytes  # type: ignore[union-attr]
        assert cache <= 0.05 * total
        longest = engine.info.max_model_len // 4 * 4096
        assert engine.shard.spec.num_blocks == longest or cache > 0.03 * total
    del engine
    assert held() <= before + (64 << 20), "a library's workspaces may stay"


def test_a_gpu_without_room_is_refused(models: Any) -> None:
    directory, _ = models("llama")
    with pytest.raises(ModelNotServable, match="leaves no room"):
        LocalEngine(directory, settings=settings(gpu_memory=0.001))


def test_two_ranks_over_nccl_give_the_tokens_of_transformers(models: Any) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed cuts the model, and is not installed")
    if torch.cuda.device_count() < 2:
        pytest.skip(f"NCCL wants a GPU for each rank; torch sees {torch.cuda.device_count()}")
    directory, expected = models("llama")
    for way in WAYS.values():
        with LocalEngine(directory, tp=2, settings=settings(**way)) as engine:
            assert tokens(engine) == expected
            engine.shard.ping()


def test_fastgen_gives_nearly_the_same_logits(tmp_path: Path) -> None:
    for package in ("deepspeed", "dskernels"):
        pytest.importorskip(package, reason=f"FastGen needs {package}, which is not installed")
    from transformers import AutoConfig, AutoModelForCausalLM

    from deployments.engine.runner import _probe
    from tests.deployments.engine.families import SHAPE, build_tokenizer

    shape = SHAPE | {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "bos_token_id": 0, "eos_token_id": 0}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape), dtype=torch.bfloat16).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    prompt, found = prompts()[-1], []
    for runner in ("auto", "fastgen"):
        with LocalEngine(tmp_path, dtype="bfloat16", settings=settings(runner=runner, block_size=128)) as engine:
            found.append(engine.shard.runner.run(_probe(prompt, start=0, table=[1]))[0].float())
            assert len(tokens(engine)[0]) == 12
    assert (found[0] - found[1]).norm() < 0.05 * found[0].norm()
