"""The compiled decoder beside the module that it was made from, on this CPU's instructions and on the plainest ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.errors import ModelNotServable
from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine.attention import NAME, KvCache, register
from deployments.engine.batch import Batch
from deployments.engine.local import LocalEngine
from deployments.engine.native import build as native_build
from deployments.engine.native.build import NativeUnavailable, library
from deployments.engine.native.decoder import PHASES, Decoder
from deployments.engine.native.description import Description, describe
from deployments.engine.native.proof import Disproved, Ranks, decoder_of
from deployments.engine.runner import Runner, load_model
from deployments.engine.runners import Runners
from tests.deployments.engine.families import FAMILIES, VOCABULARY, build

BLOCK, BLOCKS = 16, 32
CACHE = EngineSettings().cache


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: build(family, root / family) for family in ("llama", "gemma2", "gpt_neox")}


def checked(directory: Path, dtype: str = "float32") -> Runner:
    runner = Runner(load_model(directory, dtype), KvCache(BLOCKS, BLOCK))
    runner.check()
    return runner


def decoder(runner: Runner, *, threads: int = 2, cache: Path = CACHE) -> Decoder:
    described = describe(runner.model, runner.cache.calls, 0, 256)
    return Decoder(described, num_blocks=BLOCKS, block_size=BLOCK, threads=threads, cache=cache)


def steps(seed: int = 0) -> list[Batch]:
    """Three sequences: prompts of many lengths, a token of each, then tokens beside a chunk."""
    numbers = np.random.default_rng(seed)
    tables = numbers.permutation(BLOCKS)[:24].reshape(3, 8).astype(np.int32)
    lengths = np.array([3, 29, 70])
    work = [(np.zeros(3, int), lengths), (lengths, np.ones(3, int)), (lengths + 1, np.array([1, 1, 40]))]
    return [
        Batch(
            numbers.integers(0, VOCABULARY, counts.sum()).astype(np.int32),
            starts.astype(np.int32),
            counts.astype(np.int32),
            np.arange(3, dtype=np.int32),
            tables,
        )
        for starts, counts in work
    ]


def run(runner: Runner | Decoder) -> list[Tensor]:
    return [runner.run(batch).float() for batch in steps()]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_float32_logits_are_those_of_the_module(directories: dict[str, Path], family: str, threads: int) -> None:
    runner = checked(directories[family])
    expected = run(runner)
    for found, wanted in zip(run(decoder(runner, threads=threads)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_biases_are_added_wherever_a_model_has_them() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    register()
    torch.manual_seed(0)
    config = LlamaConfig(**FAMILIES["llama"], attention_bias=True, mlp_bias=True, attn_implementation=NAME)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    runner = Runner(model, KvCache(BLOCKS, BLOCK))
    runner.check()
    expected = run(runner)
    for found, wanted in zip(run(decoder(runner)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_is_no_further_from_float32_than_torch_is(directories: dict[str, Path], family: str) -> None:
    exact = run(checked(directories[family]))
    runner = checked(directories[family], "bfloat16")
    plain = run(runner)
    ours = run(decoder(runner))

    def error(found: list[Tensor]) -> float:
        return sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True))

    assert error(ours) <= 1.05 * error(plain)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_without_vector_instructions_by_name_gives_the_same_logits(
    directories: dict[str, Path], dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = checked(directories["llama"], dtype)
    expected = run(runner)
    plain = [flag for flag in native_build.FLAGS if not flag.startswith("-march")]
    monkeypatch.setattr(native_build, "FLAGS", [*plain, "-Wno-psabi"])
    for found, wanted in zip(run(decoder(runner, cache=tmp_path)), expected, strict=True):
        tolerance = 1e-4 if dtype == "float32" else 0.03
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def test_what_an_earlier_owner_left_in_a_block_is_never_seen(directories: dict[str, Path]) -> None:
    runner = checked(directories["llama"], "bfloat16")
    subject = decoder(runner)
    clean = run(subject)
    for pages in subject._pages:
        pages.view(np.uint16)[:] = 0x7FC0  # NaN in every slot
    for found, wanted in zip(run(subject), clean, strict=True):
        assert torch.equal(found, wanted)


def test_a_step_without_wanted_logits_only_fills_the_cache(directories: dict[str, Path]) -> None:
    subject = decoder(checked(directories["llama"]))
    first, second, _ = steps()
    expected = [subject.run(first), subject.run(second)][1]
    nothing = Batch(first.tokens, first.starts, first.counts, np.zeros(0, np.int32), first.tables)
    assert subject.run(nothing).shape == (0, VOCABULARY)
    assert torch.equal(subject.run(second), expected)


def test_a_profile_counts_every_phase(directories: dict[str, Path]) -> None:
    subject = decoder(checked(directories["llama"]))
    assert not any(subject.profile().values())
    subject.run(steps()[0])
    first = subject.profile()
    assert tuple(first) == PHASES
    assert all(seconds > 0 for phase, seconds in first.items() if phase != "reduce")
    subject.run(steps()[0])
    assert all(subject.profile()[phase] > first[phase] for phase in PHASES if phase != "reduce")


def test_packing_gives_the_modules_memory_back(directories: dict[str, Path]) -> None:
    runner = checked(directories["llama"])
    before = runner.weight_bytes
    subject = decoder(runner)
    assert runner.weight_bytes < before / 4
    assert 0.95 * before < subject.weight_bytes < 1.3 * before  # norms are not counted; packing may pad


def take_over(runner: Runner, **options: object) -> Decoder:
    settings = {"num_blocks": BLOCKS, "max_positions": 256, "threads": 1, "cache": CACHE, "ranks": Ranks()} | options
    return decoder_of(runner, **settings)  # type: ignore[arg-type]


def test_a_family_that_the_decoder_does_not_know_keeps_its_module(directories: dict[str, Path]) -> None:
    runner = checked(directories["gpt_neox"])
    before = run(runner)
    with pytest.raises(NativeUnavailable, match="gpt_neox"):
        take_over(runner)
    assert all(torch.equal(a, b) for a, b in zip(run(runner), before, strict=True))


def test_blocks_that_are_no_whole_vectors_are_left_to_torch(directories: dict[str, Path]) -> None:
    runner = Runner(load_model(directories["llama"], "float32"), KvCache(BLOCKS, 8))
    runner.check()
    with pytest.raises(NativeUnavailable, match=r"engine\.block_size"):
        take_over(runner)


def test_another_rank_that_cannot_is_followed(directories: dict[str, Path]) -> None:
    with pytest.raises(NativeUnavailable, match="another rank"):
        take_over(checked(directories["llama"]), ranks=Ranks(all_agree=lambda mine: False))


def test_wrong_logits_are_found_out(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(*arguments: Any) -> Description:
        found = describe(*arguments)
        found.layers[0].call = replace(found.layers[0].call, scale=found.layers[0].call.scale * 2)
        return found

    runner = checked(directories["llama"])
    monkeypatch.setattr("deployments.engine.native.proof.describe", mistaken)
    with pytest.raises(Disproved, match="other logits"):
        take_over(runner)


def test_a_disproved_decoder_falls_back_to_a_fresh_module(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.engine.native.proof.TOLERANCE", {torch.float32: 0.0})
    prompt, sampling = [[1, 2, 3]], Sampling(temperature=0.0, max_tokens=5)
    with LocalEngine(directories["llama"], settings=EngineSettings(native=False)) as plain:
        expected = plain.generate(prompt, sampling)[0].token_ids
    with LocalEngine(directories["llama"]) as engine:
        assert isinstance(engine.shard.runner, Runner)
        assert engine.generate(prompt, sampling)[0].token_ids == expected
    with pytest.raises(ModelNotServable, match=r"engine\.native=true"):
        LocalEngine(directories["llama"], settings=EngineSettings(native=True))


def test_a_failing_reduction_ends_the_step_with_its_own_error(directories: dict[str, Path]) -> None:
    class PeerLost(Exception):
        pass

    def fail(numbers: Tensor) -> None:
        raise PeerLost

    runner = checked(directories["llama"])
    described = describe(runner.model, runner.cache.calls, 0, 256)
    subject = Decoder(described, num_blocks=BLOCKS, block_size=BLOCK, threads=2, cache=CACHE, wire=fail)
    with pytest.raises(PeerLost):
        subject.run(steps()[0])


def test_no_compiler_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeUnavailable, match=r"apt install g\+\+"):
        library(tmp_path / "cache")


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "FLAGS", ["-fno-such-flag"])
    with pytest.raises(NativeUnavailable, match="no-such-flag"):
        library(tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.so"))


def refuses(*_: Any) -> Runner:
    raise ModelNotServable("these weights are not numbers")


def test_torch_leaves_the_cores_to_the_decoders_threads(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own would spin on them after every small operation between two steps, and make a step several times longer."""
    before, ours = torch.get_num_threads(), EngineSettings(kv_cache_bytes=1 << 22, threads=2, native=True)
    try:
        with LocalEngine(directories["llama"], settings=ours) as engine:
            assert torch.get_num_threads() == 1
            with monkeypatch.context() as broken:
                broken.setattr(Runners, "_loaded", refuses)
                with pytest.raises(ModelNotServable):
                    engine.shard._held.swap(directories["llama"])
            assert torch.get_num_threads() == 1, "it goes on"
        with LocalEngine(directories["llama"], settings=ours.model_copy(update={"native": False})):
            assert torch.get_num_threads() == 2, "torch computes here"
    finally:
        torch.set_num_threads(before)
