"""The benchmark of forms, around dice in the place of a model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from bench.harness import Row
from bench.structured import CORPUS, WAYS, Measurement, Timed, Work, compile_times, measure, rows, table
from cluster.types import Constraint
from deployments.engine import schemas
from deployments.engine.local import LocalEngine
from tests.deployments.engine import texts
from tests.deployments.engine.test_structured import Dice

MEASURED = Measurement(8, {"free": 100.0, "held": 80.0, "forced": 95.0}, 12.0, 340.0, 0.25)


def test_all_ways_answer_the_same_work(tmp_path: Path) -> None:
    dice, grammars = Dice(texts.byte_level(tmp_path)), Timed(tmp_path)
    engine = LocalEngine.__new__(LocalEngine)
    dice.grammars = grammars
    engine.engine = dice.engine(prefix_cache=False)
    engine.info = SimpleNamespace(max_model_len=1000)  # type: ignore[assignment]
    found = measure(engine, grammars, Work(2, prompt_tokens=6, output_tokens=60), dice.tokenizer.vocab_size, rounds=1)
    assert found.tokens_per_s.keys() == set(WAYS)
    assert 0 < found.mask_us <= found.mask_p99_us
    assert 0 <= found.forced_share < 1, "guesses are tried where they pay, and not each token is forced"


def test_every_schema_of_the_corpus_is_one_that_is_served(tmp_path: Path) -> None:
    assert all(schemas.admit(schema, strict=True, param="p") for schema in CORPUS.values())
    assert compile_times(Timed(texts.byte_level(tmp_path)), CORPUS, 2).keys() == CORPUS.keys()


def test_the_schema_does_not_end_before_the_tokens_do() -> None:
    constraint = Work(1).sampling("held").constraint
    assert constraint == Constraint("json_schema", constraint.text)  # type: ignore[union-attr]
    assert json.loads(constraint.text)["minItems"] > Work(1).output_tokens  # type: ignore[union-attr]
    assert Work(1).sampling("free").constraint is None


def test_the_peer_is_the_engine_without_a_schema() -> None:
    assert rows([MEASURED], "S") == [Row("S", 8, 1, 95.0, 100.0, "without a schema", 0.95)]


def test_the_table_shows_every_way() -> None:
    shown = table([MEASURED])
    assert dict(zip(shown.columns, shown.lines[0], strict=True))["forced of free"] == "0.95"
