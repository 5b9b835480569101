"""Gathering, delivering, leaving, refusing: the loop around the policy, with a model that is told when to go on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest

from cluster.errors import Overloaded, PlatformError, Unavailable
from deployments.batching.batches import smoothed, step_tokens
from deployments.encode.batcher import Batcher
from deployments.encode.row import Floats, Row


class Slow:
    """Answers with the row's length and its first token, once it may."""

    def __init__(self) -> None:
        self.may_run = threading.Event()
        self.may_run.set()
        self.steps: list[int] = []

    def run(self, rows: Sequence[Row]) -> Floats:
        assert self.may_run.wait(10)
        self.steps.append(len(rows))
        if any(row.ids[0] == 666 for row in rows):
            raise RuntimeError("no such number")
        return np.array([[len(row), np.nan if row.ids[0] == 13 else row.ids[0]] for row in rows], np.float32)


@pytest.fixture
async def model() -> Slow:
    return Slow()


@pytest.fixture
async def batcher(model: Slow) -> AsyncIterator[Batcher]:
    batcher = Batcher(model.run, 2, target_s=0.04, limit=10_000)
    yield batcher
    model.may_run.set()
    await batcher.close()


def rows(count: int, first: int = 1, length: int = 10) -> list[Row]:
    return [Row([first + place, *[0] * (length - 1)]) for place in range(count)]


async def test_everybody_gets_its_own_rows_in_their_order(batcher: Batcher) -> None:
    answers = await asyncio.gather(*(batcher.encode(b"t%d" % (n % 3), rows(40, 1000 * n)) for n in range(1, 20)))
    for n, answer in enumerate(answers, 1):
        assert answer[:, 1].tolist() == [1000 * n + place for place in range(40)]


async def test_what_waits_is_gathered_into_one_step(batcher: Batcher, model: Slow) -> None:
    model.may_run.clear()
    waiting = [asyncio.ensure_future(batcher.encode(b"t", rows(1, n))) for n in range(5)]
    await asyncio.sleep(0.02)
    model.may_run.set()
    await asyncio.gather(*waiting)
    assert model.steps == [5] or (model.steps[0] < 5 and sum(model.steps) == 5 and len(model.steps) == 2)


async def test_who_leaves_takes_its_rows_along(batcher: Batcher, model: Slow) -> None:
    model.may_run.clear()
    bulk = asyncio.ensure_future(batcher.encode(b"bulk", rows(500, 1000)))
    await asyncio.sleep(0.02)
    assert batcher.stats["waiting"] > 400
    bulk.cancel()
    await asyncio.gather(bulk, return_exceptions=True)
    assert (batcher.stats["waiting"], batcher.stats["streams"], batcher.stats["aborted"]) == (0, 0, 1)
    model.may_run.set()
    assert (await batcher.encode(b"other", rows(1, 7)))[0, 1] == 7
    assert sum(model.steps) < 100


async def test_a_full_queue_says_when_to_come_back_and_its_greediest_tenant_goes_first(batcher: Batcher, model: Slow) -> None:
    model.may_run.clear()
    calls = [asyncio.ensure_future(batcher.encode(b"greedy", rows(400, 1000))) for _ in range(2)]
    await asyncio.sleep(0.02)
    with pytest.raises(Overloaded) as refused:
        await batcher.encode(b"greedy", rows(400, 1000))
    assert refused.value.retry_after_s
    other = asyncio.ensure_future(batcher.encode(b"other", rows(300, 1000)))
    with pytest.raises(Overloaded):
        await calls[1]
    model.may_run.set()
    assert len(await other) == 300
    assert len(await calls[0]) == 400


async def test_a_steps_time_is_split_over_the_calls_in_it(batcher: Batcher, model: Slow) -> None:
    model.may_run.clear()
    short = [asyncio.ensure_future(batcher.metered(b"t", rows(1, n))) for n in range(5)]
    long, gone = (asyncio.ensure_future(batcher.metered(b"u", rows(count, 1000))) for count in (100, 90))
    await asyncio.sleep(0.02)
    gone.cancel()
    model.may_run.set()
    paid = [compute_us for _, compute_us in await asyncio.gather(*short, long)]
    stats = batcher.stats
    assert stats["attributed_s"] == pytest.approx(stats["busy_s"], abs=1.1e-6)
    assert stats["busy_s"] <= stats["held_s"]
    assert sum(paid) <= round(stats["attributed_s"] * 1e6), "who left has paid for what was computed, if anything was"
    assert all(paid)
    after = [await batcher.metered(b"t", rows(10, 100 * n)) for n in range(1, 6)]
    assert sum(compute_us for _, compute_us in after) == round((batcher.stats["attributed_s"] - stats["attributed_s"]) * 1e6)


@pytest.mark.parametrize("first", [666, 13])
async def test_a_failure_is_an_error_for_whose_row_it_was_and_the_next_call_works(batcher: Batcher, first: int) -> None:
    with pytest.raises(PlatformError):
        await batcher.encode(b"t", rows(1, first))
    assert (await batcher.encode(b"t", rows(1, 5)))[0, 1] == 5
    assert not batcher.is_dead


async def test_numbers_that_are_not_finite_hurt_no_batch_mate(batcher: Batcher, model: Slow) -> None:
    model.may_run.clear()
    good, bad = (asyncio.ensure_future(batcher.encode(b"t", rows(1, first))) for first in (5, 13))
    await asyncio.sleep(0.02)
    model.may_run.set()
    assert (await good)[0, 1] == 5
    with pytest.raises(PlatformError, match="not finite"):
        await bad


async def test_closing_refuses_who_waits(model: Slow) -> None:
    model.may_run.clear()
    batcher = Batcher(model.run, 2, target_s=0.04, limit=10_000)
    waiting = asyncio.ensure_future(batcher.encode(b"t", rows(500, 1000)))
    await asyncio.sleep(0.02)
    model.may_run.set()
    await batcher.close()
    with pytest.raises(Unavailable):
        await waiting


def test_a_step_follows_what_was_measured() -> None:
    speed = 2000.0
    for _ in range(40):
        speed = smoothed(speed, 4096, 4096 / 50_000)
    assert 45_000 < speed < 51_000
    assert step_tokens(speed, 0.04) == int(speed * 0.04)
    assert abs(smoothed(speed, 8, 0.01) - speed) < 0.01 * speed, "a step of eight tokens says little"
