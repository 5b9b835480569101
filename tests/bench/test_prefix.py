"""The prefix benchmark: the work that it gives, and what it makes of the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.engines import Engine
from bench.harness import Row
from bench.prefix import Measurement, Work, cases, rows, summarise, table

WORK = Work(num_requests=4, system_tokens=90, question_tokens=10, output_tokens=5)
OURS = Engine("mmaas tp=1", "x.py", Path("python"), ours=True)
OTHER = Engine("other", "y.py", Path("python"))


def answer(num_tokens: int = 5, **more: int) -> dict[str, Any]:
    requests = [{"num_tokens": num_tokens, "first_token_s": (i + 1) / 1000, "finished_s": 1.0, **more} for i in range(4)]
    return {"wall_s": 2.0, "requests": requests}


def measured(engine: Engine, speed: float, *, cache: bool) -> Measurement:
    return Measurement(engine.name, "S", 8, cache, engine.ours, speed, 1.0, 2.0, None)


def test_prompts_share_the_system_prompt_and_nothing_else() -> None:
    prompts = WORK.prompts(0, vocab_size=10_000)
    assert {len(prompt) for prompt in prompts} == {100}
    assert len({tuple(prompt[:90]) for prompt in prompts}) == 1
    assert len({tuple(prompt[90:]) for prompt in prompts}) == 4


def test_the_warm_up_has_another_system_prompt() -> None:
    assert WORK.prompts(0, 10_000) == WORK.prompts(0, 10_000)
    assert WORK.prompts(0, 10_000)[0][:16] != WORK.prompts(1, 10_000)[0][:16]


def test_ours_runs_with_and_without_the_cache_and_others_with_it() -> None:
    assert cases([OURS, OTHER]) == [(OURS, False), (OURS, True), (OTHER, True)]


def test_the_hit_ratio_counts_prompt_tokens() -> None:
    m = summarise(answer(cached_tokens=75), OURS, "S", WORK, 8, True)
    assert (m.hit_ratio, m.tokens_per_s, m.first_token_p50_ms) == (0.75, 10.0, 2.5)
    assert m.first_token_p95_ms == pytest.approx(3.85)


def test_an_engine_that_does_not_tell_its_hits_has_no_ratio() -> None:
    assert summarise(answer(), OTHER, "S", WORK, 8, True).hit_ratio is None


def test_an_engine_that_answers_short_counts_for_nothing() -> None:
    with pytest.raises(RuntimeError, match=r"\[4\] tokens"):
        summarise(answer(num_tokens=4), OTHER, "S", WORK, 8, True)


def test_only_ours_with_the_cache_is_compared() -> None:
    some = [measured(OURS, 10, cache=False), measured(OURS, 60, cache=True), measured(OTHER, 30, cache=True)]
    assert rows(some) == [Row("S", 8, 1, 60, 30, "other", 2.0)]
    assert rows(some[:2]) == [Row("S", 8, 1, 60, None, None, None)]


def test_the_table_gives_speed_relative_to_ours_without_the_cache() -> None:
    some = [measured(OURS, 10, cache=False), measured(OURS, 60, cache=True), measured(OTHER, 30, cache=True)]
    assert [line[4] for line in table(some, Work()).lines] == ["1.00", "6.00", "3.00"]
    assert table(some[2:], Work()).lines[0][4] == "-"
