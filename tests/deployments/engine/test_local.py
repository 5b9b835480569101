"""The whole engine against transformers: greedy float32 tokens must be the same, whatever the batch, the cache or the ranks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from cluster.errors import ModelNotServable
from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine.local import LocalEngine
from tests.deployments.engine.families import VOCABULARY, build, reference
from tests.deployments.engine.ranks import Report, run_on_two_ranks

SERVABLE = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt_neox", "opt"]
SHARDABLE = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt_neox"]
LENGTHS = (3, 17, 30, 1, 9, 40)
GREEDY = Sampling(temperature=0.0, max_tokens=12)
REPORTED = Sampling(temperature=0.0, max_tokens=12, logprobs=0)
ROOMY = EngineSettings(block_size=4, kv_cache_bytes=1 << 22, max_batch_tokens=256, threads=1)
TIGHT = EngineSettings(block_size=4, kv_cache_bytes=1 << 22, max_batch_tokens=16, max_sequences=8, threads=1)


def prompts(seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, VOCABULARY) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[list[int]]]]:
    root = tmp_path_factory.mktemp("models")
    directories = {family: build(family, root / family) for family in SERVABLE}
    return {family: (path, reference(path, prompts(), 12)) for family, path in directories.items()}


def tokens(engine: LocalEngine, **options: int) -> list[list[int]]:
    return [result.token_ids for result in engine.generate(prompts(), GREEDY, **options)]


@pytest.mark.parametrize("family", SERVABLE)
def test_mixed_lengths_in_one_batch_give_the_tokens_of_transformers(models: dict, family: str) -> None:
    directory, expected = models[family]
    with LocalEngine(directory, settings=ROOMY) as engine:
        assert tokens(engine) == expected
        assert engine.engine.stats().preemptions == 0


@pytest.mark.parametrize("family", SERVABLE)
def test_chunks_and_preemption_change_no_token(models: dict, family: str) -> None:
    directory, expected = models[family]
    with LocalEngine(directory, settings=TIGHT, blocks=16) as engine:
        assert tokens(engine) == expected
        assert engine.engine.stats().preemptions > 0, "the pool was meant to be too small"
        engine.engine.scheduler.check_integrity()
        assert engine.engine.stats().blocks_used == 0


@pytest.fixture(scope="module")
def two_ranks(models: dict) -> dict[str, Report]:
    """What two ranks say of every family. One pair of processes for all: joining a group costs seconds."""
    settings = TIGHT.model_copy(update={"shared_memory": False})
    return run_on_two_ranks({family: models[family][0] for family in SHARDABLE}, prompts(), settings, num_blocks=16)


@pytest.mark.parametrize("family", SHARDABLE)
def test_two_ranks_give_the_tokens_of_transformers(models: dict, two_ranks: dict[str, Report], family: str) -> None:
    directory, expected = models[family]
    report = two_ranks[family]
    assert report.tokens == expected
    assert report.preemptions > 0
    with LocalEngine(directory, settings=ROOMY) as whole:
        assert report.parameters < 0.75 * sum(parameter.numel() for parameter in whole.shard.runner.model.parameters())


@pytest.mark.parametrize("family", SHARDABLE)
def test_logits_of_two_ranks_are_those_of_one(models: dict, two_ranks: dict[str, Report], family: str) -> None:
    with LocalEngine(models[family][0], settings=ROOMY) as one:
        expected = one.generate(prompts(), REPORTED)
    for result, logprobs in zip(expected, two_ranks[family].logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(result.logprobs), rtol=1e-4, atol=1e-4)


def test_prefix_cache_changes_no_token(models: dict) -> None:
    directory, expected = models["qwen3"]
    with LocalEngine(directory, settings=TIGHT) as engine:
        assert tokens(engine) == expected
        assert tokens(engine) == expected
        assert engine.engine.stats().cached_tokens > 0, "the second round was meant to hit"


def test_batch_mates_change_no_sampled_token(models: dict) -> None:
    directory, _ = models["llama"]
    sampling = Sampling(temperature=0.9, top_p=0.9, top_k=30, max_tokens=12, seed=5, repetition_penalty=1.1)
    with LocalEngine(directory, settings=ROOMY) as engine:
        alone = [engine.generate([prompt], sampling)[0].token_ids for prompt in prompts()]
        together = [result.token_ids for result in engine.generate(prompts(), sampling)]
    assert together == alone


def test_preemption_changes_no_sampled_token(models: dict) -> None:
    directory, _ = models["llama"]
    sampling = Sampling(temperature=1.0, max_tokens=20, seed=3, frequency_penalty=0.5)
    results = []
    for blocks in (200, 15):
        with LocalEngine(directory, settings=TIGHT, blocks=blocks) as engine:
            results.append([result.token_ids for result in engine.generate(prompts(), sampling)])
            assert (engine.engine.stats().preemptions > 0) == (blocks == 15)
    assert results[0] == results[1]


@pytest.mark.slow
def test_shared_memory_between_ranks_changes_no_token(models: dict) -> None:
    directory, expected = models["llama"]
    report = run_on_two_ranks({"llama": directory}, prompts(), TIGHT, num_blocks=16)["llama"]
    assert report.tokens == expected


@pytest.mark.parametrize(("family", "reason"), [("bloom", "paged"), ("falcon", "attention")])
def test_model_that_cannot_be_paged_is_refused(tmp_path: Path, family: str, reason: str) -> None:
    with pytest.raises(ModelNotServable, match=reason):
        LocalEngine(build(family, tmp_path / family), settings=ROOMY)
