"""The benchmark of guessing, with an engine whose model is a table."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bench.harness import Row
from bench.speculation import TEXTS, Measurement, Work, measure, rows, table
from cluster.settings import EngineSettings
from deployments.engine.engine import Engine
from deployments.engine.local import LocalEngine
from tests.deployments.engine.arithmetic import Recall

MEASURED = [Measurement("loops", 8, 100.0, 250.0, 3.0, drafted=40, accepted=30), Measurement("noise", 8, 100.0, 99.0, 1.0, 0, 0)]


def local(surprise: float) -> LocalEngine:
    """An engine without ranks, around a model of 12 tokens."""
    engine = LocalEngine.__new__(LocalEngine)
    settings = EngineSettings(block_size=4, max_sequences=4, max_batch_tokens=64, prefix_cache=False)
    engine.engine = Engine.of(Recall(400, 4, surprise=surprise), 400, settings)
    engine.info = SimpleNamespace(max_model_len=1000)  # type: ignore[assignment]
    return engine


def test_both_ways_answer_the_same_work() -> None:
    work = Work("loops", concurrency=2, per_caller=2, prompt_tokens=6, output_tokens=40)
    found = measure(local(surprise=0.0), work, 12, rounds=2)
    assert (found.text, found.concurrency) == ("loops", 2)
    assert min(found.plain_tokens_per_s, found.guessing_tokens_per_s) > 0
    assert 0 <= found.accepted <= found.drafted


def test_a_guess_that_is_right_saves_steps() -> None:
    engine = local(surprise=0.0)
    engine.engine.clock = iter(range(10**6)).__next__  # every step takes the same time
    found = measure(engine, Work("loops", 1, prompt_tokens=6, output_tokens=60), 12, rounds=1)
    assert found.tokens_per_step > 1.5
    assert found.accepted > 20


@pytest.mark.parametrize("text", TEXTS)
def test_texts_differ_in_temperature_alone(text: str) -> None:
    assert Work(text, 1).sampling.temperature == TEXTS[text]
    assert Work(text, 1).prompts(100) == Work("loops", 1).prompts(100)


def test_the_peer_is_the_engine_without_guessing() -> None:
    assert rows(MEASURED, "S", 1)[0] == Row("S: loops", 8, 1, 250.0, 100.0, "without guessing", 2.5)


def test_the_table_shows_acceptance_where_there_was_a_guess() -> None:
    shown = table(MEASURED)
    cells = [dict(zip(shown.columns, line, strict=True)) for line in shown.lines]
    assert [(cell["ratio"], cell["guessed"], cell["accepted"]) for cell in cells] == [("2.50", "40", "0.75"), ("0.99", "0", "-")]
