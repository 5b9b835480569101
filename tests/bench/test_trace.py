"""The trace as it was recorded, and faster."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.trace import Arrival, at_rate, read

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
ROWS = ["2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109", "2023-11-16 18:16:01.0000000,3,1"]


def written(tmp_path: Path, rows: list[str]) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(HEAD + "".join(f"{row}\r\n" for row in rows), newline="")
    return path


def test_a_trace_is_read_to_the_last_digit(tmp_path: Path) -> None:
    first, second, third = read(written(tmp_path, ROWS))
    assert first == Arrival(0.0, 374, 44)
    assert second.at_s == pytest.approx(4.314579, abs=1e-6)
    assert third.at_s == pytest.approx(14.31941, abs=1e-6)


def test_shorter_requests_keep_a_prompt_and_a_time_between_tokens(tmp_path: Path) -> None:
    arrivals = read(written(tmp_path, ROWS), shorter=8)
    assert [(a.prompt_tokens, a.output_tokens) for a in arrivals] == [(47, 6), (50, 14), (1, 2)]


@pytest.mark.parametrize("rows", [[], ROWS[::-1]])
def test_what_is_no_trace_is_refused(tmp_path: Path, rows: list[str]) -> None:
    with pytest.raises(ValueError, match="order of arrival"):
        read(written(tmp_path, rows))


def test_ours_is_the_beginning_of_the_hour() -> None:
    arrivals = read()
    assert len(arrivals) == 1000
    assert 200 < arrivals[-1].at_s < 240
    assert max(a.prompt_tokens + a.output_tokens for a in read(shorter=8)) < 2048


@given(rate=st.floats(0.2, 30), seconds=st.floats(5, 30))
def test_a_rate_changes_the_speed_of_time_alone(rate: float, seconds: float) -> None:
    arrivals = read()
    load = at_rate(arrivals, rate, seconds)
    assert len(load) == max(2, round(rate * seconds))
    assert (len(load) - 1) / load[-1].at_s == pytest.approx(rate)
    assert [(a.prompt_tokens, a.output_tokens) for a in load] == [(a.prompt_tokens, a.output_tokens) for a in arrivals[: len(load)]]
    factor = load[-1].at_s / arrivals[len(load) - 1].at_s
    for (a, b), (x, y) in zip(pairwise(load), pairwise(arrivals), strict=False):
        assert b.at_s - a.at_s == pytest.approx((y.at_s - x.at_s) * factor, abs=1e-6)


def test_a_trace_that_is_too_short_says_so() -> None:
    with pytest.raises(ValueError, match="the trace has 1000"):
        at_rate(read(), 100, 20)


def test_prompts_are_ordinary_tokens() -> None:
    prompt = Arrival(0.0, 500, 1).prompt(random.Random(0), 10)
    assert len(prompt) == 500
    assert set(prompt) == set(range(3, 10))
