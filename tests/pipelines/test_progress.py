from __future__ import annotations

import io
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pipelines.progress import LogDisplay, TerminalDisplay, display, remaining_s, sparkline
from training.journal import Failure, Progress

HALF = Progress(step=50, steps=100, loss=1.25, learning_rate=0.1, tokens=5000, tokens_per_s=100.0, resumed_from=0, pids=(1, 2))


def test_the_terminal_shows_stages_loss_speed_and_the_answer() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    shown = display(console)
    assert isinstance(shown, TerminalDisplay)
    shown.stage("Reading")
    shown.stage("Learning")
    shown.tell(HALF)
    shown.tell(Failure({"1": "WorkerDied"}))
    shown.tell(HALF)
    shown.stage("Registering")
    shown.finish("models:/chat/1", "What does str.split do?", "Return a list.")
    shown.close()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("Reading", "Learning", "50/100", "1.25", "100 tokens/s", "Registering", "Return a list.", "models:/chat/1"):
        assert part in text, part


def test_without_a_terminal_everything_is_a_log_event(caplog: pytest.LogCaptureFixture) -> None:
    shown = display(Console(file=io.StringIO()))
    assert isinstance(shown, LogDisplay)
    with caplog.at_level(logging.INFO):
        shown.stage("Learning")
        shown.tell(HALF)
        shown.tell(Failure({"1": "WorkerDied"}))
        shown.finish("models:/chat/1", "Q?", "A.")
        shown.close()
    text = caplog.text
    for part in ("Learning", "step 50 of 100", "loss 1.250", "WorkerDied", "models:/chat/1", "'A.'"):
        assert part in text, part


def test_time_left_follows_from_the_speed() -> None:
    assert remaining_s(HALF) == pytest.approx(50.0)


@given(st.lists(st.floats(0, 100), max_size=200))
def test_a_sparkline_is_never_wider_than_asked(values: list[float]) -> None:
    assert len(sparkline(values, 24)) == min(len(values), 24)


def test_a_falling_loss_falls() -> None:
    assert sparkline([3.0, 2.0, 1.0, 0.0]) == "█▆▃▁"
    assert sparkline([1.0, 1.0]) == "▁▁"
