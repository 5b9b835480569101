"""The engine behind its real socket: rank 0's loop runs in a thread, the replica's end on the test's event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from cluster.errors import Conflict, Overloaded, PlatformError, ReplicaLost, Unavailable
from cluster.settings import EngineSettings
from deployments.engine.batch import Batch
from deployments.engine.lead import lead
from deployments.engine.messages import Request
from deployments.engine.orders import Look, Sleep, Swap, Wake
from deployments.engine.remote import RemoteEngine
from tests.deployments.engine.arithmetic import count_up, request


@dataclass
class CountingShard:
    """Stands for a loaded rank: counts up, and can be told to break or to wait."""

    spec: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(
            directory=Path("without-a-tokenizer"), num_blocks=64, settings=EngineSettings(block_size=4, max_sequences=8)
        )
    )
    broken: bool = False
    gate: threading.Event = field(default_factory=threading.Event)
    pings: int = 0
    stopped: bool = False
    is_asleep: bool = False
    obeyed: list[object] = field(default_factory=list)
    refuses: bool = False
    sampler: None = None  # the engine's own
    depth: int = 1

    def launch(self, batch: Batch) -> None: ...

    def execute(self, batch: Batch) -> object:
        self.gate.wait()
        if self.broken:
            raise RuntimeError("peer closed the connection")
        return count_up(batch)

    def ping(self) -> None:
        self.pings += 1

    def command(self, order: object) -> None:
        self.gate.wait()
        if self.refuses:
            raise PlatformError("another rank could not obey")
        self.obeyed.append(order)
        self.is_asleep = isinstance(order, Sleep) or (self.is_asleep and not isinstance(order, Wake))

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture(params=[0.0, 0.02], ids=["token by token", "gathered"])
async def pair(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[tuple[RemoteEngine, CountingShard]]:
    engine, shard = RemoteEngine(tmp_path / "rank0.sock", request.param), CountingShard()
    shard.gate.set()
    await engine.listen()
    thread = threading.Thread(target=_run, args=(shard, str(engine.path)))
    thread.start()
    await engine.connected()
    yield engine, shard
    shard.gate.set()
    engine.close()
    await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive(), "rank 0 ends when the replica hangs up"


def _run(shard: CountingShard, path: str) -> None:
    try:
        lead(shard, path)  # type: ignore[arg-type]
    except RuntimeError:
        assert shard.broken


async def collect(engine: RemoteEngine, number: int, prompt: list[int], **options: object) -> list[int]:
    items = engine.generate(request(number, prompt, **options))  # type: ignore[arg-type]
    return [output.token async for outputs in items for output in outputs]


async def until(condition: object) -> None:
    async with asyncio.timeout(10):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.02)


async def test_streams_run_side_by_side_and_never_cross(pair: tuple[RemoteEngine, CountingShard]) -> None:
    engine, _ = pair
    answers = await asyncio.gather(*(collect(engine, number, [number], max_tokens=20) for number in range(1, 40)))
    assert answers == [[number + place for place in range(1, 21)] for number in range(1, 40)]
    assert engine.num_streams == 0


async def test_leaving_a_stream_aborts_it(pair: tuple[RemoteEngine, CountingShard]) -> None:
    engine, _ = pair
    stream = engine.generate(request(1, [1], 10_000 // 50))
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    await until(lambda: engine.stats.aborted == 1 and engine.stats.blocks_used == 0)


async def test_stopped_choice_sends_nothing_more_and_the_other_goes_on(pair: tuple[RemoteEngine, CountingShard]) -> None:
    engine, _ = pair
    seen: dict[int, int] = {0: 0, 1: 0}
    async for outputs in engine.generate(request(1, [1], 150, n=2)):
        for output in outputs:
            seen[output.index] += 1
        if seen[0] and 0 in {output.index for output in outputs}:
            engine.abort(1, 0)
    assert seen[1] == 150
    assert seen[0] < 150


def of(tenant: bytes, number: int, priority: str = "interactive") -> Request:
    return msgspec.structs.replace(request(number, [number], 4), tenant=tenant, priority=priority)


async def answer(engine: RemoteEngine, asked: Request) -> list[int]:
    return [output.token async for outputs in engine.generate(asked) for output in outputs]


async def test_full_queue_refuses_the_newest_of_who_has_most(pair: tuple[RemoteEngine, CountingShard]) -> None:
    engine, shard = pair
    shard.gate.clear()
    tasks = [asyncio.create_task(answer(engine, of(tenant, number))) for number, tenant in enumerate((b"a", b"b", b"a", b"a"))]
    await until(lambda: engine.num_streams == 4)
    newcomers = (b"a", b"b", b"b", b"c", b"c")
    assert [engine.make_place(tenant, "interactive") for tenant in newcomers] == [False, True, False, True, False]
    assert engine.num_streams == 2
    await asyncio.wait(tasks[2:])  # they have said that they leave before anything is computed
    shard.gate.set()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert ended[:2] == [[1, 2, 3, 4], [2, 3, 4, 5]]
    assert [type(result) for result in ended[2:]] == [Overloaded, Overloaded]
    await until(lambda: engine.stats.aborted == 2 and engine.stats.blocks_used == 0)


async def test_full_queue_refuses_batch_first_and_nobody_for_batch(pair: tuple[RemoteEngine, CountingShard]) -> None:
    engine, shard = pair
    shard.gate.clear()
    asked = [of(b"a", 1), of(b"a", 2), of(b"b", 3, "batch")]
    tasks = [asyncio.create_task(answer(engine, request)) for request in asked]
    await until(lambda: engine.num_streams == 3)
    assert not engine.make_place(b"c", "batch")
    assert engine.make_place(b"a", "interactive")
    shard.gate.set()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, Overloaded) for result in ended] == [False, False, True]


async def test_who_has_a_token_is_never_refused(pair: tuple[RemoteEngine, CountingShard]) -> None:
    engine, _ = pair
    streams = [engine.generate(of(b"a", number)) for number in (1, 2, 3)]
    for stream in streams:
        await anext(stream)
    assert not engine.make_place(b"b", "interactive")
    for stream in streams:
        await stream.aclose()  # type: ignore[attr-defined]


async def test_idle_group_is_pinged_and_that_counts_as_progress(pair: tuple[RemoteEngine, CountingShard]) -> None:
    engine, shard = pair
    await until(lambda: shard.pings >= 2)
    assert engine.silence_s < 5


async def test_hung_step_is_silence(pair: tuple[RemoteEngine, CountingShard]) -> None:
    engine, shard = pair
    shard.gate.clear()
    task = asyncio.create_task(collect(engine, 1, [1]))
    await until(lambda: engine.silence_s > 2.5)
    shard.gate.set()
    assert await task == [2, 3, 4, 5]
    assert engine.silence_s < 2


async def test_broken_step_ends_every_stream_with_an_error(pair: tuple[RemoteEngine, CountingShard]) -> None:
    engine, shard = pair
    shard.gate.clear()
    tasks = [asyncio.create_task(collect(engine, number, [number], max_tokens=50)) for number in range(1, 6)]
    await until(lambda: engine.num_streams == 5)
    shard.broken = True
    engine.fail("a shard of the model's group died")
    shard.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, ReplicaLost) for result in results)
    with pytest.raises(ReplicaLost):
        await collect(engine, 9, [9])
    shard.broken = True


async def test_order_is_awaited_and_streams_go_on(pair: tuple[RemoteEngine, CountingShard]) -> None:
    engine, shard = pair
    answer = asyncio.create_task(collect(engine, 1, [1], max_tokens=100))
    await engine.order(Look())
    assert shard.obeyed == [Look()]
    assert len(await answer) == 100
    assert not engine.is_obeying


async def test_refused_order_is_an_error_and_the_group_goes_on(pair: tuple[RemoteEngine, CountingShard]) -> None:
    engine, shard = pair
    shard.refuses = True
    with pytest.raises(Unavailable, match="could not obey"):
        await engine.order(Look())
    shard.refuses = False
    await engine.order(Look())
    assert await collect(engine, 1, [1]) == [2, 3, 4, 5]


async def test_order_to_a_lost_group_is_an_error(pair: tuple[RemoteEngine, CountingShard]) -> None:
    engine, shard = pair
    shard.gate.clear()
    order = asyncio.create_task(engine.order(Look()))
    await until(lambda: engine.is_obeying)
    engine.fail("a shard of the model's group died")
    with pytest.raises(ReplicaLost):
        await order
    with pytest.raises(ReplicaLost):
        await engine.order(Look())


async def test_nothing_is_lost_or_computed_in_a_sleep(pair: tuple[RemoteEngine, CountingShard]) -> None:
    engine, shard = pair
    running = asyncio.create_task(collect(engine, 1, [1], max_tokens=200))
    await until(lambda: engine.stats.running == 1)
    engine.hold()
    await engine.order(Sleep())
    later = asyncio.create_task(collect(engine, 2, [7]))
    await until(lambda: engine.num_held == 1)
    await until(lambda: shard.pings >= 1)
    steps = engine.stats.steps
    await until(lambda: shard.pings >= 3)
    assert 0 < engine.stats.steps == steps
    assert not running.done()
    assert not later.done()
    await engine.order(Wake())
    engine.release()
    assert await later == [8, 9, 10, 11]
    assert await running == [(2 + place) % 300 for place in range(200)]
    await until(lambda: engine.stats.blocks_used == 0)


async def test_weights_are_never_swapped_under_an_answer(pair: tuple[RemoteEngine, CountingShard]) -> None:
    engine, shard = pair
    running = asyncio.create_task(collect(engine, 1, [1], max_tokens=150))
    await until(lambda: engine.num_streams == 1)
    engine.hold()
    later = asyncio.create_task(collect(engine, 2, [7]))
    with pytest.raises(Conflict, match="still running"):
        await engine.order(Swap("elsewhere"))
    assert shard.obeyed == []
    await engine.drain()
    assert running.done() or await running
    await engine.order(Swap("elsewhere"))
    assert not later.done(), "it waits for the new weights"
    engine.release()
    assert await later == [8, 9, 10, 11]
    assert shard.obeyed == [Swap("elsewhere")]
