"""Every complete answer has the form that was asked for, by jsonschema and Python's own expressions, whatever the model says."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st

from cluster.settings import EngineSettings
from cluster.types import Constraint, Sampling
from deployments.engine import schemas
from deployments.engine.batch import Batch
from deployments.engine.engine import Engine
from deployments.engine.local import LocalEngine
from deployments.engine.messages import Output, Request
from deployments.engine.sequence import NO_TOKEN
from deployments.engine.structured import Grammars, unpacked
from deployments.engine.tokenizer import Tokenizer
from tests.deployments.engine import families, texts
from tests.deployments.engine.forms import CONSTRAINTS, HOSTILE_CONSTRAINTS, SCHEMAS

BLOCKS, BLOCK_SIZE = 400, 16
LENGTH = 400


class Dice:
    """An engine whose model says nearly anything, and the tokenizer that its tokens are read with."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.load(directory)
        self.grammars = Grammars(directory)
        self.table = torch.randn(1009, self.tokenizer.vocab_size, generator=torch.Generator().manual_seed(0)) * 2

    def engine(self, blocks: int = BLOCKS, **options: Any) -> Engine:
        settings = EngineSettings(block_size=BLOCK_SIZE, max_sequences=8, max_batch_tokens=64, **options)
        return Engine.of(self.throw, blocks, settings, grammars=self.grammars)

    def throw(self, batch: Batch) -> torch.Tensor:
        """`Engine.execute`: a row of the table for each pair of last token and place."""
        places = np.repeat(batch.starts, batch.counts) + np.concatenate([np.arange(count) for count in batch.counts])
        rows = (batch.tokens * 31 + places * 7)[batch.rows] % len(self.table)
        return self.table[torch.from_numpy(rows.astype(np.int64))]

    def request(self, number: int, constraint: Constraint | None, max_tokens: int = LENGTH, **sampling: Any) -> Request:
        sampling = {"temperature": 1.0, **sampling}
        stops = [] if sampling.get("ignore_eos") else sorted(self.tokenizer.eos_ids)
        prompt = random.Random(number).choices(range(self.tokenizer.vocab_size), k=5)
        return Request(number, prompt, Sampling(constraint=constraint, **sampling), max_tokens, stops, seed=number)

    def text(self, outputs: list[Output]) -> str:
        return self.tokenizer.decode(output.token for output in outputs if output.token != NO_TOKEN)


def answers(engine: Engine, requests: list[Request]) -> dict[tuple[int, int], list[Output]]:
    for request in requests:
        engine.add(request)
    found: dict[tuple[int, int], list[Output]] = defaultdict(list)
    while engine.has_work:
        for output in engine.step():
            found[output.request_id, output.index].append(output)
    engine.scheduler.check_integrity()
    return found


def tokens(outputs: list[Output]) -> list[int]:
    return [output.token for output in outputs]


def of(schema: Any) -> Constraint:
    return Constraint("json_schema", schemas.admit(schema, strict=True, param="schema"))


def check(schema: Any, text: str) -> None:
    """By exact arithmetic: jsonschema divides floats."""
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    validator(exact).validate(json.loads(text, parse_float=Decimal, parse_int=int))


@pytest.fixture(scope="module")
def dice(tmp_path_factory: pytest.TempPathFactory) -> Dice:
    torch.set_num_threads(1)  # as a rank does; small tensors are slower with more
    return Dice(texts.byte_level(tmp_path_factory.mktemp("dice")))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("speculation", [0, 8])
def test_every_complete_answer_has_the_form(dice: Dice, temperature: float, speculation: int) -> None:
    named = {number: (name, schema) for number, (name, schema) in enumerate(SCHEMAS.items())}
    engine = dice.engine(speculation=speculation)
    found = answers(
        engine, [dice.request(number, of(schema), temperature=temperature, n=2) for number, (_, schema) in named.items()]
    )
    complete = 0
    for (number, _), outputs in found.items():
        name, schema = named[number]
        assert outputs[-1].finish_reason in ("stop", "length"), name
        if outputs[-1].finish_reason == "stop":
            check(schema, dice.text(outputs))
            complete += 1
    assert complete > 0.9 * len(found), "too few answers came to their end to say anything"
    assert bool(engine.stats().accepted_tokens) == bool(speculation), "what a schema forces is guessed"


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_expressions_and_grammars_are_met_whole(dice: Dice, name: str) -> None:
    constraint, expression = CONSTRAINTS[name]
    for outputs in answers(dice.engine(), [dice.request(number, constraint) for number in range(4)]).values():
        assert outputs[-1].finish_reason == "stop"
        assert re.fullmatch(expression, dice.text(outputs))


def test_any_object_is_an_object(dice: Dice) -> None:
    requests = [dice.request(number, Constraint("json_object")) for number in range(8)]
    found = [dice.text(outputs) for outputs in answers(dice.engine(), requests).values() if outputs[-1].finish_reason == "stop"]
    assert found
    assert all(isinstance(json.loads(text), dict) for text in found)


def test_sentencepiece_tokens_are_read_as_they_are_shown(tmp_path: Path) -> None:
    dice = Dice(texts.sentencepiece(tmp_path))
    named = dict(enumerate(SCHEMAS.values()))
    found = answers(dice.engine(), [dice.request(number, of(schema)) for number, schema in named.items()])
    complete = [
        (named[number], dice.text(outputs)) for (number, _), outputs in found.items() if outputs[-1].finish_reason == "stop"
    ]
    assert len(complete) > 0.8 * len(named)
    for schema, text in complete:
        check(schema, text)


def test_guesses_and_preemption_change_no_token(dice: Dice) -> None:
    requests = [dice.request(number, of(schema), 80) for number, schema in enumerate(SCHEMAS.values())]
    plain = answers(dice.engine(speculation=0), requests)
    engine = dice.engine(blocks=14, speculation=6)
    assert {key: tokens(outputs) for key, outputs in answers(engine, requests).items()} == {
        key: tokens(outputs) for key, outputs in plain.items()
    }
    assert engine.stats().preemptions > 0


def test_neighbours_get_the_tokens_that_they_get_without(dice: Dice) -> None:
    free = [dice.request(100 + number, None, 60, temperature=number % 2) for number in range(4)]
    bound = [dice.request(number, of(schema), 60) for number, schema in enumerate(list(SCHEMAS.values())[:8])]
    alone, together = answers(dice.engine(), free), answers(dice.engine(), [*bound, *free])
    assert all(tokens(together[key]) == tokens(outputs) for key, outputs in alone.items())


def test_a_finished_form_ends_the_answer_whatever_else_was_asked_for(dice: Dice) -> None:
    """Neither `ignore_eos` nor `min_tokens` nor a bias makes an answer go on behind its end, and none lifts what is forbidden."""
    some = dice.tokenizer.encode("x")[0]
    asked = {"ignore_eos": True, "min_tokens": 300, "logit_bias": ((some, 100.0),), "repetition_penalty": 1.3}
    schema = SCHEMAS["flat"]
    for outputs in answers(dice.engine(), [dice.request(number, of(schema), **asked) for number in range(4)]).values():
        assert outputs[-1].finish_reason == "stop"
        check(schema, dice.text(outputs))


def test_an_answer_that_could_go_on_may_end(dice: Dice) -> None:
    """An expression that is complete and could be longer ends by the model's own end, and by that alone."""
    for outputs in answers(dice.engine(), [dice.request(number, Constraint("regex", "a+"), 3000) for number in range(4)]).values():
        assert outputs[-1].finish_reason == "stop"
        assert outputs[-1].token in dice.tokenizer.eos_ids


def test_an_answer_that_is_cut_says_so(dice: Dice) -> None:
    outputs = answers(dice.engine(), [dice.request(1, of(SCHEMAS["flat"]), 4)])[1, 0]
    assert (outputs[-1].finish_reason, len(outputs)) == ("length", 4)


def test_log_probabilities_are_the_models_own(dice: Dice) -> None:
    """Before any mask, as those of the API are before any bias."""
    constraint = Constraint("regex", "z{4}")
    (outputs,) = answers(dice.engine(), [dice.request(1, constraint, logprobs=3)]).values()
    assert any(output.token not in dict(output.top) for output in outputs), "the model itself would have said something else"
    assert all(output.logprob is not None and output.logprob < 0 for output in outputs)


@pytest.mark.parametrize("surplus", [-40, -1, 0, 1, 31, 33, 70])
def test_tokens_that_the_tokenizer_does_not_know_are_never_allowed(dice: Dice, surplus: int) -> None:
    """A model's logits may be wider than its vocabulary, or narrower."""
    matchers = [dice.grammars.matcher(Constraint("regex", expression)) for expression in ("a+", "[^b]*")]
    known = dice.tokenizer.vocab_size
    whole = [unpacked(row, known) for row in dice.grammars.allowed(matchers, known)]
    width = known + surplus
    for row, expected in zip(dice.grammars.allowed(matchers, width), whole, strict=True):
        assert len(row) == -(-width // 32)
        every = unpacked(row, 32 * len(row))
        assert not every[min(known, width) :].any()
        assert (every[: min(known, width)] == expected[:width]).all()


def test_a_failed_matcher_ends_its_sequence_alone(dice: Dice) -> None:
    engine, constraint = dice.engine(), of(SCHEMAS["flat"])
    free, bound = dice.request(1, None, 20), dice.request(2, constraint)
    expected = tokens(answers(dice.engine(), [free])[1, 0])
    engine.add(free)
    engine.add(bound)
    outputs = [output for _ in range(3) for output in engine.step()]
    next(sequence for sequence in engine.scheduler.running if sequence.request_id == 2).matcher.fail()  # type: ignore[union-attr]
    while engine.has_work:
        outputs += engine.step()
    last = [output for output in outputs if output.request_id == 2][-1]
    assert last == Output(2, 0, NO_TOKEN, finish_reason="error", compute_us=last.compute_us)
    assert [output.token for output in outputs if output.request_id == 1] == expected


def test_what_cannot_be_compiled_ends_with_an_error(dice: Dice) -> None:
    """Admission lets nothing of the kind through; if it did, nobody else would notice."""
    for constraint in (Constraint("regex", "(?=a)b"), Constraint("json_schema", "no JSON"), Constraint("grammar", "start: start")):
        (outputs,) = answers(dice.engine(), [dice.request(1, constraint)]).values()
        assert [(output.token, output.finish_reason) for output in outputs] == [(NO_TOKEN, "error")]


@pytest.mark.parametrize("name", HOSTILE_CONSTRAINTS)
def test_hostile_ones_end_too(dice: Dice, name: str) -> None:
    """Whatever admission thinks of them: the bounds of one step hold at every step."""
    (outputs,) = answers(dice.engine(), [dice.request(1, HOSTILE_CONSTRAINTS[name], 60)]).values()
    assert outputs[-1].finish_reason in ("stop", "length", "error")


def test_aborts_leave_nothing(dice: Dice) -> None:
    engine = dice.engine()
    for number, schema in enumerate(SCHEMAS.values()):
        engine.add(dice.request(number, of(schema), n=2))
    for number in range(len(SCHEMAS)):
        engine.step()
        engine.abort(number, number % 2)
        engine.abort(number)
    assert not engine.has_work
    assert engine.stats().blocks_used == 0
    engine.scheduler.check_integrity()


def generated() -> st.SearchStrategy[Any]:
    """Schemas with an end in sight."""
    count = st.integers(0, 4)
    leaf = st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": '\u00e9\\"'}, {"enum": [1, "a", None]}]),
        st.tuples(st.integers(-50, 50), count).map(lambda p: {"type": "integer", "minimum": p[0], "maximum": p[0] + p[1]}),
        st.tuples(count, count).map(lambda p: {"type": "string", "minLength": p[0], "maxLength": p[0] + p[1]}),
        st.sampled_from(["^[a-c]{2,4}$", "x.y", "^(ab|c)*$"]).map(lambda p: {"type": "string", "pattern": p, "maxLength": 9}),
    )

    def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        properties = st.dictionaries(st.sampled_from(["a", "b c", 'd"', "\u00fc", "e\n"]), inner, min_size=1, max_size=3)
        objects = st.tuples(properties, st.integers(0, 3)).map(
            lambda p: {"type": "object", "properties": p[0], "required": sorted(p[0])[: p[1]], "additionalProperties": False}
        )
        arrays = st.tuples(inner, count).map(lambda p: {"type": "array", "items": p[0], "maxItems": p[1]})
        unions = st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options})
        return st.one_of(objects, arrays, unions)

    return st.recursive(leaf, larger, max_leaves=5)


@limits(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schema=generated(), seed=st.integers(0, 1000))
def test_any_schema_is_met(dice: Dice, schema: Any, seed: int) -> None:
    (outputs,) = answers(dice.engine(speculation=seed % 2 * 4), [dice.request(seed, of(schema), 700)]).values()
    assert outputs[-1].finish_reason in ("stop", "length")
    if outputs[-1].finish_reason == "stop":
        check(schema, dice.text(outputs))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.build("llama", tmp_path_factory.mktemp("llama"))


def generations(engine: LocalEngine) -> Iterator[tuple[Any, str]]:
    named = list(SCHEMAS.values())[:10]
    samplings = [Sampling(max_tokens=180, seed=number, constraint=of(schema)) for number, schema in enumerate(named)]
    tokenizer = Tokenizer.load(engine.shard.spec.directory)
    prompts = [[number + 1] * 5 for number in range(len(named))]
    for schema, result in zip(named, engine.generate(prompts, samplings), strict=True):
        if result.finish_reason == "stop":
            yield schema, tokenizer.decode(result.token_ids)


@pytest.mark.parametrize("native", [False, True])
def test_real_models_meet_the_form(llama: Path, native: bool) -> None:
    settings = EngineSettings(kv_cache_bytes=1 << 22, max_batch_tokens=256, threads=1, native=native, block_size=16)
    with LocalEngine(llama, settings=settings) as engine:
        found = list(generations(engine))
    assert len(found) > 5
    for schema, text in found:
        check(schema, text)
