"""Who is stuck, judged from what the ranks say of themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deployments.engine.local import LocalEngine
from deployments.engine.stepclock import Doing, StepClock, Watch
from tests.deployments.engine.families import build
from tests.deployments.engine.test_poison import GREEDY, HEALTHY, PATHS, SETTINGS


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def of(rank: int, talk: int, *, step: int = 7, ticks: float = 0.0, waits: bool = False) -> Doing:
    return Doing(rank, "waiting" if waits else "computing", step, talk, ticks)


def watch(*moments: Doing | None, seconds: int = 12, size: int = 2) -> str | None:
    """After looking at the same moments for so long."""
    time = Time()
    found = Watch(size, time)
    for _ in range(seconds + 1):
        found.saw(moments)
        time.now += 1
    time.now -= 1
    return found.stuck(10)


def test_one_that_all_others_wait_for_is_named() -> None:
    assert watch(of(0, 31), of(1, 30)) == "rank 1 has been in step 7 for 12 s, computing"
    assert watch(of(0, 30), of(1, 31, waits=True)) == "rank 0 has been in step 7 for 12 s, computing"
    assert watch(of(0, 5), of(1, 5), of(2, 4), of(3, 5), size=4) == "rank 2 has been in step 7 for 12 s, computing"


def test_one_that_does_not_answer_is_named_with_the_step_of_the_others() -> None:
    assert watch(None, of(1, 30)) == "rank 0 doesn't answer in step 7 for 12 s"
    assert watch(of(0, 30), None) == "rank 1 doesn't answer in step 7 for 12 s"
    assert watch(None, None) == "rank 0 doesn't answer in a step for 12 s"


def test_nothing_is_said_before_the_deadline() -> None:
    assert watch(of(0, 31), of(1, 30), seconds=9) is None
    assert watch(of(0, 31), None, seconds=9) is None
    assert Watch(2, Time()).stuck(10) is None


def test_a_long_step_is_progress_while_any_rank_ticks() -> None:
    time = Time()
    found = Watch(2, time)
    for second in range(100):
        found.saw([of(0, 30), of(1, 30, ticks=second // 8)])
        assert found.stuck(10) is None
        time.now += 1


def test_one_that_answers_again_was_not_stuck() -> None:
    time = Time()
    found = Watch(2, time)
    for second in range(60):
        silent = second % 10 < 8
        found.saw([of(0, second), None if silent else of(1, second)])
        assert found.stuck(10) is None
        time.now += 1


def test_a_watcher_that_was_stopped_itself_accuses_nobody_at_once() -> None:
    found = Watch(2, Time())
    found.saw([of(0, 31), of(1, 30)], silence_s=5)
    assert found.stuck(10) is None


def test_clock_says_what_a_rank_does() -> None:
    clock = StepClock()
    assert clock.phase == "loading"
    clock.computes()
    assert (clock.phase, clock.step) == ("computing", 1)
    clock.waits()
    clock.obeys()
    assert (clock.phase, clock.step) == ("obeying an order", 1)


@pytest.mark.parametrize("path", PATHS)
def test_a_rank_ticks_within_its_steps(tmp_path: Path, path: str) -> None:
    with LocalEngine(build("llama", tmp_path / "llama"), settings=SETTINGS.model_copy(update=PATHS[path])) as engine:
        before = engine.shard.doing()
        engine.generate(HEALTHY, GREEDY)
        after = engine.shard.doing()
    assert before.phase == after.phase == "waiting"
    assert after.step > before.step
    assert after.ticks > before.ticks
    assert replace(after, ticks=before.ticks) != before
    assert engine.shard.doing().ticks < after.ticks, "closed, and still answers"
