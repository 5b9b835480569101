"""The budget of a step: a simulated machine's steps stay near the target, whatever a token costs it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine.batch import Batch
from deployments.engine.chunking import SMALLEST, Chunking
from deployments.engine.engine import Engine
from deployments.engine.messages import Request

torch = pytest.importorskip("torch")


def enter(policy: Chunking, decoders: int, decode_s: float, token_s: float, prompt: int) -> list[float]:
    """Seconds of every step from a prompt's arrival until it is in."""
    for _ in range(5):
        policy.learn(decoders, 0, decode_s)
    taken = []
    while prompt > 0:
        chunk = min(prompt, policy.budget(decoders) - decoders)
        assert chunk > 0, "the prompt always goes on"
        taken.append(decode_s + chunk * token_s)
        policy.learn(decoders, chunk, taken[-1])
        prompt -= chunk
    return taken


@given(decode_ms=st.floats(0.1, 500), token_us=st.floats(1, 5000), decoders=st.integers(1, 64))
def test_a_step_takes_no_more_than_the_target_or_twice_its_own(decode_ms: float, token_us: float, decoders: int) -> None:
    decode_s, token_s = decode_ms / 1e3, token_us / 1e6
    steps = enter(Chunking(4096, 0.15), decoders, decode_s, token_s, 4000)
    assert max(steps[1:], default=0.0) <= max(0.15, 2 * decode_s, decode_s + SMALLEST * token_s) + token_s
    assert len(steps) <= 4000 / SMALLEST


def test_a_fast_machine_soon_takes_whole_prompts() -> None:
    steps = enter(Chunking(4096, 0.15), 8, 0.003, 20e-6, 8000)
    assert len(steps) <= 8


def test_a_quick_step_does_not_make_a_giant_of_the_next() -> None:
    policy = Chunking(4096, 0.15)
    policy.learn(8, 0, 0.05)
    policy.learn(8, 40, 0.05)  # the clock saw no difference
    assert policy.budget(8) == 8 + 80


def test_a_step_takes_longer_while_more_wait_for_their_first_token_than_read() -> None:
    policy = Chunking(100_000, 0.15)
    for _ in range(20):
        policy.learn(8, 0, 0.05)
        policy.learn(8, policy.budget(8) - 8, 0.05 + (policy.budget(8) - 8) * 1e-4)
    chunks = [policy.budget(8, newcomers) - 8 for newcomers in (1, 8, 12, 16, 1000)]
    assert chunks == pytest.approx(
        [1000, 1000, 1750, 2000, 2000], rel=0.01
    )  # the last would be 2500, but no more than twice the last


def test_nobody_waits_for_a_token_when_nobody_decodes() -> None:
    policy = Chunking(1024, 0.15)
    policy.learn(8, 16, 5.0)
    assert policy.budget(0) == 1024
    assert policy.budget(8) == 8 + SMALLEST
    assert Chunking(1024, 0.0).budget(8) == 1024
    assert Chunking(16, 0.15).budget(16) == 16, "a decoder never lacks its token"


def test_the_engine_cuts_chunks_to_the_time_that_they_take() -> None:
    seconds = [0.0]

    def execute(batch: Batch) -> object:
        seconds[0] += 0.02 + 0.001 * int(batch.counts[batch.counts > 1].sum())
        return torch.eye(50)[batch.tokens[batch.rows]]

    engine = Engine.of(execute, 1000, EngineSettings(step_target_ms=60, speculation=0, prefix_cache=False))  # type: ignore[arg-type]
    engine.clock = lambda: seconds[0]
    sampling = Sampling(temperature=0.0, ignore_eos=True)
    for number in range(4):
        engine.add(Request(number, [1, 2, 3], sampling, 500, [], 0))
    for _ in range(5):
        engine.step()
    engine.add(Request(9, [1] * 1000, sampling, 5, [], 0))
    took = []
    while not any(output.request_id == 9 for output in engine.step()):
        took.append(seconds[0])
    gaps = [b - a for a, b in itertools.pairwise(took)]
    assert max(gaps) <= 0.061
    assert len(gaps) > 15
    engine.scheduler.check_integrity()
