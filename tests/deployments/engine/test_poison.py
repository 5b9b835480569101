"""A sequence whose logits are not finite ends with an error, and nothing of it reaches any other: not beside it, not after it.

The poison is an embedding row of NaN, put in after the load, which would refuse it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import ModelNotServable
from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine import finite
from deployments.engine.engine import Engine
from deployments.engine.local import Generation, LocalEngine
from deployments.engine.messages import Request
from deployments.engine.sampler import NO_TOKEN
from tests.deployments.engine.arithmetic import VOCABULARY as COUNTED
from tests.deployments.engine.arithmetic import count_up, request
from tests.deployments.engine.families import build, reference

PATHS = {"torch": {"native": False, "block_size": 4}, "native": {"native": True, "block_size": 16}}
POISON = 287
GREEDY = Sampling(temperature=0.0, max_tokens=12)
SETTINGS = EngineSettings(kv_cache_bytes=1 << 22, max_batch_tokens=24, max_sequences=8, threads=1)
HEALTHY = [[5, 6, 7] * 9, [9, 8], [20 + i for i in range(30)], [40]]
POISONED = [[POISON], [3, POISON, 4], [*range(50, 90), POISON, *range(50, 60)]]
BATCH = [POISONED[0], HEALTHY[0], POISONED[1], HEALTHY[1], POISONED[2], HEALTHY[2], HEALTHY[3]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[list[int]]:
    answers = reference(directory, HEALTHY, 12)
    assert not any(POISON in answer for answer in answers)
    return answers


def poison(shard: Any, token: int = POISON) -> None:
    runner = shard.runner
    if hasattr(runner, "_model"):
        table = runner._model.embeddings
    else:
        layer = runner.model.get_input_embeddings()
        layer.weight = torch.nn.Parameter(layer.weight.clone(), requires_grad=False)  # of a tied model, only this end
        table = layer.weight
    with torch.no_grad():
        table[token] = torch.nan


def check(answers: list[Generation], expected: list[list[int]]) -> None:
    ill = [answer for prompt, answer in zip(BATCH, answers, strict=True) if POISON in prompt]
    well = [answer for prompt, answer in zip(BATCH, answers, strict=True) if POISON not in prompt]
    assert [(answer.finish_reason, answer.token_ids) for answer in ill] == [("error", [])] * 3
    assert [answer.token_ids for answer in well] == expected
    assert {answer.finish_reason for answer in well} == {"length"}


@pytest.mark.parametrize("path", PATHS)
def test_poison_stays_in_its_sequence(directory: Path, expected: list[list[int]], path: str) -> None:
    """In chunks, with preemption, with blocks that a poisoned sequence had before, twice, so that prefixes are looked up."""
    with LocalEngine(
        directory, settings=SETTINGS.model_copy(update=PATHS[path]), blocks={"torch": 24, "native": 7}[path]
    ) as engine:
        poison(engine.shard)
        for _ in range(2):
            check(engine.generate(BATCH, GREEDY), expected)
            engine.engine.scheduler.check_integrity()
        assert engine.engine.stats().failed == 6
        assert engine.engine.stats().blocks_used == 0
        assert engine.engine.stats().preemptions > 0, "the pool was meant to be too small"


@pytest.mark.parametrize("path", PATHS)
def test_sequence_that_samples_the_poison_keeps_what_it_said(directory: Path, expected: list[list[int]], path: str) -> None:
    fatal = next(token for token in expected[2][3:] if not any(token in text for text in (*HEALTHY, expected[0], expected[2][:3])))
    said = expected[2][: expected[2].index(fatal) + 1]
    with LocalEngine(directory, settings=SETTINGS.model_copy(update=PATHS[path])) as engine:
        poison(engine.shard, fatal)
        ill, well = engine.generate([HEALTHY[2], HEALTHY[0]], GREEDY)
    assert (ill.token_ids, ill.finish_reason) == (said, "error")
    assert (well.token_ids, well.finish_reason) == (expected[0], "length")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", PATHS)
def test_what_stands_before_the_poison_is_sound_for_those_who_share_it(tmp_path: Path, path: str, dtype: str, family: str) -> None:
    """One step computes the beginning with the poison behind it, and the caller hangs up before any logits could tell."""
    prompt = HEALTHY[2]
    ill = [*prompt[:16], POISON, *range(60, 120)]
    settings = SETTINGS.model_copy(update=PATHS[path])
    with LocalEngine(build(family, tmp_path / family), settings=settings, dtype=dtype) as local:
        before = local.generate([prompt], GREEDY)[0]
        local.engine.scheduler.forget_all()
        poison(local.shard)
        local.engine.add(Request(77, ill, GREEDY, 12, [], 0))
        assert local.engine.step() == []
        local.engine.abort(77)
        after = local.generate([prompt], GREEDY)[0]
    assert after.cached_tokens >= 16, "the block in front of the poison was meant to be found"
    assert after.finish_reason == "length"
    assert dtype == "bfloat16" or after.token_ids == before.token_ids


def failing(prefixes: set[int]) -> Any:
    """Counts up, but for sequences whose last token is one of these."""

    def execute(batch: Any) -> torch.Tensor:
        logits = count_up(batch)
        for row, token in enumerate(batch.tokens[batch.rows].tolist()):
            if token in prefixes:
                logits[row, 7 if token % 2 else slice(None)] = torch.nan if token % 2 else -torch.inf
        return logits

    return execute


SMALL = EngineSettings(block_size=4, max_sequences=4, max_batch_tokens=16)


def test_prefix_of_a_failed_sequence_is_forgotten_and_of_others_kept() -> None:
    engine = Engine.of(failing({99}), 32, SMALL)
    engine.add(request(1, [*range(12), 99]))
    engine.add(request(2, [*range(100, 112), 50]))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert [(o.token, o.finish_reason) for o in outputs if o.request_id == 1] == [(NO_TOKEN, "error")]
    assert [o.token for o in outputs if o.request_id == 2] == [51, 52, 53, 54]
    engine.scheduler.check_integrity()
    assert engine.stats().blocks_cached == 4, "sixteen tokens of the other"
    engine.add(request(3, [*range(12), 98]))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert [o.cached for o in outputs][:1] == [0]
    assert [o.token for o in outputs] == [99, NO_TOKEN]


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0}, {"frequency_penalty": 1.0}, {"logprobs": 2}, {"min_tokens": 2}])
def test_one_choice_fails_and_the_others_go_on(how: dict) -> None:
    engine = Engine.of(failing({40}), 32, SMALL)
    engine.add(request(1, [40], stop_ids=(7,), **how))
    engine.add(request(2, [10], n=2, stop_ids=(200,), **how))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert [(o.token, o.finish_reason, o.logprob) for o in outputs if o.request_id == 1] == [(NO_TOKEN, "error", None)]
    assert [o.token for o in outputs if o.request_id == 2] == [t for t in range(11, 15) for _ in range(2)]
    assert COUNTED > 200


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_never_start(directory: Path, tmp_path: Path, bad: float, dtype: str) -> None:
    """In a row that no probe asks for."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON, 3] = bad
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path)
    with pytest.raises(ModelNotServable, match=r"embed_tokens.*not finite"):
        LocalEngine(tmp_path, settings=SETTINGS, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_one_bad_number_anywhere_is_found(dtype: torch.dtype) -> None:
    numbers = torch.rand(1000).to(dtype)
    assert finite.is_finite(numbers)
    for place in (0, 517, 999):
        broken = numbers.clone()
        broken[place] = torch.nan
        assert not finite.is_finite(broken)
    assert finite.is_finite(torch.zeros(0, dtype=dtype))
