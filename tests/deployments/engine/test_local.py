"""The whole engine against transformers: greedy float32 tokens must be the same, whatever the batch, the cache or the ranks."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from cluster.errors import ModelNotServable
from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine.local import LocalEngine
from deployments.engine.tokenizer import Tokenizer
from tests.deployments.engine.families import VOCABULARY, build, reference
from tests.deployments.engine.guesses import Guesses
from tests.deployments.engine.ranks import FORM, Report, run_on_two_ranks

SERVABLE = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi3", "granite", "gpt_neox", "opt"]
NATIVE = SERVABLE[:-2]
SHARDABLE = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt_neox"]
PATHS = {"torch": {"native": False, "block_size": 4}, "native": {"native": True, "block_size": 16}}
SERVED = [(family, "torch") for family in SERVABLE] + [(family, "native") for family in NATIVE]
SHARDED = [(family, "torch") for family in SHARDABLE] + [(family, "native") for family in SHARDABLE if family in NATIVE]
FEW_BLOCKS = {"torch": 16, "native": 5}
LENGTHS = (3, 17, 30, 1, 9, 40)
GREEDY = Sampling(temperature=0.0, max_tokens=12)
REPORTED = Sampling(temperature=0.0, max_tokens=12, logprobs=0)
ROOMY = EngineSettings(kv_cache_bytes=1 << 22, max_batch_tokens=256, threads=1)
TIGHT = EngineSettings(kv_cache_bytes=1 << 22, max_batch_tokens=16, max_sequences=8, threads=1)


def through(path: str, settings: EngineSettings) -> EngineSettings:
    return settings.model_copy(update=PATHS[path])


SAMPLED = Sampling(temperature=0.9, top_p=0.9, top_k=30, max_tokens=12, seed=5, repetition_penalty=1.1)


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


@pytest.mark.parametrize(("family", "path"), SERVED)
def test_mixed_lengths_in_one_batch_give_the_tokens_of_transformers(models: dict, family: str, path: str) -> None:
    directory, expected = models[family]
    with LocalEngine(directory, settings=through(path, ROOMY)) as engine:
        assert tokens(engine) == expected
        assert engine.engine.stats().preemptions == 0


@pytest.mark.parametrize(("family", "path"), SERVED)
def test_chunks_and_preemption_change_no_token(models: dict, family: str, path: str) -> None:
    directory, expected = models[family]
    with LocalEngine(directory, settings=through(path, TIGHT), blocks=FEW_BLOCKS[path]) as engine:
        assert tokens(engine) == expected
        assert engine.engine.stats().preemptions > 0, "the pool was meant to be too small"
        engine.engine.scheduler.check_integrity()
        assert engine.engine.stats().blocks_used == 0


@pytest.fixture(scope="module")
def two_ranks(models: dict) -> Callable[[str], dict[str, Report]]:
    """What two ranks say of every family. One pair of processes for all of a path: joining a group costs seconds."""

    @cache
    def reports(path: str) -> dict[str, Report]:
        settings = through(path, TIGHT).model_copy(update={"shared_memory": False, "speculation": 0})
        directories = {family: models[family][0] for family, other in SHARDED if other == path}
        return run_on_two_ranks(directories, prompts(), settings, num_blocks=FEW_BLOCKS[path])

    return reports


@pytest.mark.parametrize(("family", "path"), SHARDED)
def test_two_ranks_give_the_tokens_of_transformers(
    models: dict, two_ranks: Callable[[str], dict[str, Report]], family: str, path: str
) -> None:
    directory, expected = models[family]
    report = two_ranks(path)[family]
    assert report.tokens == expected
    assert report.preemptions > 0
    with LocalEngine(directory, settings=through(path, ROOMY)) as whole:
        assert report.weight_bytes < 0.75 * whole.shard.runner.weight_bytes


@pytest.mark.parametrize(("family", "path"), SHARDED)
def test_guesses_change_no_token_of_two_ranks(
    models: dict, two_ranks: Callable[[str], dict[str, Report]], family: str, path: str
) -> None:
    report = two_ranks(path)[family]
    assert report.guessed == models[family][1]
    assert report.accepted > 10


@pytest.mark.parametrize(("family", "path"), SHARDED)
def test_answers_of_two_ranks_have_the_form(
    models: dict, two_ranks: Callable[[str], dict[str, Report]], family: str, path: str
) -> None:
    tokenizer = Tokenizer.load(models[family][0])
    assert all(re.fullmatch(FORM, tokenizer.decode(answer)) for answer in two_ranks(path)[family].formed)


@pytest.mark.parametrize(("family", "path"), SHARDED)
def test_logits_of_two_ranks_are_those_of_one(
    models: dict, two_ranks: Callable[[str], dict[str, Report]], family: str, path: str
) -> None:
    with LocalEngine(models[family][0], settings=through(path, ROOMY)) as one:
        expected = one.generate(prompts(), REPORTED)
    for result, logprobs in zip(expected, two_ranks(path)[family].logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(result.logprobs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "path"), SERVED)
def test_guesses_change_no_token(models: dict, family: str, path: str) -> None:
    """Right and wrong ones, at the end of a chunk too, with and without room for everybody, greedy and sampled."""
    directory, expected = models[family]
    for settings, blocks in ((ROOMY, 200), (TIGHT, FEW_BLOCKS[path])):
        unguessed = through(path, settings).model_copy(update={"speculation": 0})
        with LocalEngine(directory, settings=unguessed, blocks=blocks) as engine:
            drawn = [result.token_ids for result in engine.generate(prompts(), SAMPLED)]
            for sampling, answers in ((GREEDY, expected), (SAMPLED, drawn)):
                engine.engine.speculation = Guesses({(number, 0): answer for number, answer in enumerate(answers)})
                assert [result.token_ids for result in engine.generate(prompts(), sampling)] == answers
            assert engine.engine.stats().accepted_tokens > 20
            assert engine.engine.stats().blocks_used == 0


@pytest.mark.parametrize("path", PATHS)
def test_prompt_lookup_is_right_where_text_repeats(models: dict, path: str) -> None:
    directory, _ = models["llama"]
    repeated = [prompt * 4 for prompt in prompts()]
    told = []
    for guesses in (0, 8):
        with LocalEngine(
            directory, settings=through(path, ROOMY).model_copy(update={"speculation": guesses}), blocks=200
        ) as engine:
            engine.engine.clock = itertools.count().__next__  # every step takes the same time, so that guessing seems free
            told.append([result.token_ids for result in engine.generate(repeated, Sampling(temperature=0.0, max_tokens=60))])
            assert (engine.engine.stats().accepted_tokens > 0) == (guesses > 0)
    assert told[0] == told[1]


@pytest.mark.parametrize("path", PATHS)
def test_prefix_cache_changes_no_token(models: dict, path: str) -> None:
    directory, expected = models["qwen3"]
    with LocalEngine(directory, settings=through(path, TIGHT)) as engine:
        assert tokens(engine) == expected
        assert tokens(engine) == expected
        assert engine.engine.stats().cached_tokens > 0, "the second round was meant to hit"


@pytest.mark.parametrize("path", PATHS)
def test_batch_mates_change_no_sampled_token(models: dict, path: str) -> None:
    directory, _ = models["llama"]
    with LocalEngine(directory, settings=through(path, ROOMY)) as engine:
        alone = [engine.generate([prompt], SAMPLED)[0].token_ids for prompt in prompts()]
        together = [result.token_ids for result in engine.generate(prompts(), SAMPLED)]
    assert together == alone


@pytest.mark.parametrize("path", PATHS)
def test_preemption_changes_no_sampled_token(models: dict, path: str) -> None:
    directory, _ = models["llama"]
    sampling = Sampling(temperature=1.0, max_tokens=20, seed=3, frequency_penalty=0.5)
    results = []
    for blocks in (200, FEW_BLOCKS[path] - 1):
        with LocalEngine(directory, settings=through(path, TIGHT), blocks=blocks) as engine:
            results.append([result.token_ids for result in engine.generate(prompts(), sampling)])
            assert (engine.engine.stats().preemptions > 0) == (blocks < 200)
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_shared_memory_between_ranks_changes_no_token(models: dict, path: str) -> None:
    directory, expected = models["llama"]
    report = run_on_two_ranks({"llama": directory}, prompts(), through(path, TIGHT), num_blocks=FEW_BLOCKS[path])["llama"]
    assert report.tokens == expected


@pytest.mark.parametrize(("family", "reason"), [("bloom", "paged"), ("falcon", "attention")])
def test_model_that_cannot_be_paged_is_refused(tmp_path: Path, family: str, reason: str) -> None:
    with pytest.raises(ModelNotServable, match=reason):
        LocalEngine(build(family, tmp_path / family), settings=ROOMY)
