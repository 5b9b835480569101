from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from cluster.errors import DeadlineExceeded
from deployments.gateway import relay
from deployments.gateway.relay import Relay


class Source:
    """Counts from `first` on, slowly; knows how far it was pulled and whether it was let go."""

    def __init__(self, items: int, delay_s: float = 0.0, error: Exception | None = None) -> None:
        self.items, self.delay_s, self.error = items, delay_s, error
        self.pulled, self.closed = 0, False

    async def stream(self) -> AsyncGenerator[int, None]:
        try:
            for item in range(self.items):
                self.pulled = item + 1
                yield item
                await asyncio.sleep(self.delay_s)
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


async def collect(relayed: Relay[int], silence_s: float = 9.0) -> list[list[int]]:
    return [batch async for batch in relayed.batches(silence_s)]


async def test_keeps_order_and_loses_nothing() -> None:
    relayed = Relay([Source(1000).stream()], 9)
    assert [item for batch in await collect(relayed) for item in batch] == list(range(1000))
    await relayed.aclose()


async def test_what_piled_up_comes_as_one_batch_and_the_source_waits() -> None:
    source = Source(10 * relay.AHEAD)
    relayed = Relay([source.stream()], 9)
    for _ in range(3 * relay.AHEAD):
        await asyncio.sleep(0)
    assert source.pulled <= relay.AHEAD + 1
    first = await anext(relayed.batches(9))
    assert len(first) == relay.AHEAD
    await relayed.aclose()
    assert source.closed


async def test_items_before_a_failure_are_delivered() -> None:
    relayed = Relay([Source(3, error=ValueError("x")).stream()], 9)
    batches = relayed.batches(9)
    got = [item for _ in range(3) for item in await anext(batches)]
    assert got == [0, 1, 2]
    with pytest.raises(ValueError, match="x"):
        await anext(batches)


async def test_several_sources_end_together_and_one_failure_ends_all() -> None:
    assert sum(len(batch) for batch in await collect(Relay([Source(5).stream(), Source(7).stream()], 9))) == 12
    endless = Source(10**9, delay_s=0.001)
    relayed = Relay([endless.stream(), Source(1, error=ValueError("x")).stream()], 9)
    with pytest.raises(ValueError, match="x"):
        await collect(relayed)
    await relayed.aclose()
    assert endless.closed


async def test_silence_is_an_empty_batch() -> None:
    relayed = Relay([Source(2, delay_s=0.2).stream()], 9)
    batches = await collect(relayed, silence_s=0.02)
    assert [item for batch in batches for item in batch] == [0, 1]
    assert [] in batches


@pytest.mark.parametrize("silence_s", [0.01, 9.0])
async def test_the_deadline_holds_for_the_whole(silence_s: float) -> None:
    source = Source(10**9, delay_s=0.005)
    relayed = Relay([source.stream()], 0.1)
    with pytest.raises(DeadlineExceeded):
        await collect(relayed, silence_s)
    await relayed.aclose()
    assert source.closed
