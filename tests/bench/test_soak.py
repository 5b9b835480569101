"""A short soak of the engine, and that the soak notices what it is there to notice."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from bench.soak import soak
from bench.soak_engine import NUM_BLOCKS, SETTINGS, tiny_engine
from bench.soak_report import draw, table
from bench.soak_requests import LEAVES, NUM_KNOWN, Plan, plans
from bench.soak_run import IN_FLIGHT, Soak
from bench.step import NoModel
from cluster.types import Sampling
from deployments.engine.engine import Engine
from deployments.engine.messages import Output, Request

VOCABULARY, WINDOW = 288, 256


def test_nothing_is_left_of_five_hundred_requests(tmp_path: Path) -> None:
    with tiny_engine(tp=1) as local:
        assert soak(local, 500, seed=1, longest_s=0.0).requests == 0
        result = soak(local, 500, seed=1)
    assert result.answered + result.hung_up == 500
    assert result.left.keys() == set(LEAVES)
    assert result.preemptions > 20, "the cache was meant to be too small"
    assert 0.1 < result.cached_share < 0.9
    assert result.repeated > 20
    assert result.formed.keys() == {"schema", "text", "call"}
    assert result.adapter_loads > 12, "more adapters than slots were meant to be used"
    assert result.failed > 0, "nobody was poisoned"
    assert result.slope is None
    assert table(result, 1).lines[0][1].startswith("500: ")
    assert draw(tmp_path / "x.svg", result).stat().st_size > 1000


@pytest.mark.slow
def test_nothing_is_left_on_two_ranks() -> None:
    words = [sys.executable, "-m", "bench.soak", "--tp", "2", "--requests", "100", "--dry-run"]
    result = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr


def test_a_seed_gives_the_same_requests_and_another_seed_others() -> None:
    first, again, other = (list(plans(seed, 50, vocab_size=VOCABULARY, max_model_len=WINDOW)) for seed in (1, 1, 2))
    assert first == again != other


def test_every_request_fits_the_context_window_and_the_cache() -> None:
    drawn = list(plans(3, 3000, vocab_size=VOCABULARY, max_model_len=WINDOW))
    lengths = [len(plan.request.prompt) + plan.request.max_tokens for plan in drawn]
    assert 0.8 * WINDOW < max(lengths) <= WINDOW
    assert max(lengths) <= NUM_BLOCKS * SETTINGS.block_size
    assert [plan.request.id for plan in drawn] == list(range(3000))
    assert {plan.known for plan in drawn} == {None, *range(NUM_KNOWN)}
    assert max(len(plan.request.prompt) for plan in drawn) > SETTINGS.max_batch_tokens, "no prompt enters in chunks"


def plan(number: int = 0, *, max_tokens: int = 3, n: int = 1, known: int | None = None) -> Plan:
    sampling = Sampling(temperature=0.0, n=n)
    return Plan(Request(number, [5, 6, 7], sampling, max_tokens, [], 0), known=known)


class Faulty:
    """An engine whose outputs pass through a fault first."""

    def __init__(self, fault) -> None:
        self.real = Engine.of(NoModel(64, 8).execute, NUM_BLOCKS, SETTINGS)
        self.fault = fault

    def step(self) -> list[Output]:
        return self.fault(self.real, self.real.step())

    def __getattr__(self, name: str):
        return getattr(self.real, name)


def nothing() -> tuple[int, int, int]:
    """Instead of looking through all of this process's memory, which takes its time."""
    return 0, 0, 0


def twice(engine: Engine, outputs: list[Output]) -> list[Output]:
    return [*outputs, *(output for output in outputs if output.finish_reason)]


def early(engine: Engine, outputs: list[Output]) -> list[Output]:
    return [msgspec.structs.replace(output, finish_reason="length") for output in outputs]


def unasked(engine: Engine, outputs: list[Output]) -> list[Output]:
    return [msgspec.structs.replace(output, finish_reason="stop") for output in outputs]


def leaking(engine: Engine, outputs: list[Output]) -> list[Output]:
    if any(output.finish_reason for output in outputs):
        engine.scheduler.pool.allocate()
    return outputs


FAULTS = [
    (twice, "after its end"),
    (early, "ended after 1 tokens"),
    (unasked, "another reason"),
    (leaking, "no running sequence holds"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_a_fault_of_the_engine_is_noticed(fault, message: str) -> None:
    run = Soak(Faulty(fault), iter([plan()]), nothing)
    with pytest.raises(AssertionError, match=message):
        run.run(lambda: None)


def test_the_same_engine_without_a_fault_passes() -> None:
    run = Soak(Faulty(lambda engine, outputs: outputs), iter([plan(0), plan(1, n=2)]), nothing)
    run.run(lambda: None)
    assert (run.added, run.answered, run.output_tokens) == (2, 2, 9)


def test_an_answer_that_changes_is_noticed() -> None:
    def changing(engine: Engine, outputs: list[Output]) -> list[Output]:
        return [msgspec.structs.replace(output, token=output.request_id) for output in outputs]

    run = Soak(Faulty(changing), iter([plan(0, known=0), plan(1, known=0)]), nothing)
    with pytest.raises(AssertionError, match="another answer"):
        run.run(lambda: None)


def test_a_sequence_that_stays_in_memory_is_noticed() -> None:
    kept = []

    def keeping(engine: Engine, outputs: list[Output]) -> list[Output]:
        kept.extend(engine.scheduler.running)
        return outputs

    run = Soak(Faulty(keeping), iter([plan()]))
    with pytest.raises(AssertionError, match="still in memory"):
        run.run(lambda: None)
    kept.clear()


@pytest.mark.parametrize("leaves", LEAVES)
def test_a_caller_can_leave_at_every_moment(leaves) -> None:
    others = [plan(number, max_tokens=40) for number in range(IN_FLIGHT - 1)]
    long = replace(plan(IN_FLIGHT, max_tokens=9, n=2), leaves=leaves)
    long = replace(long, request=msgspec.structs.replace(long.request, prompt=list(range(8)) * 20))
    run = Soak(Faulty(lambda engine, outputs: outputs), iter([*others, long]), nothing)
    run.run(lambda: None)
    assert run.left == {leaves: 1}
    assert run.cut_off == (1 if leaves == "one choice" else 2)
