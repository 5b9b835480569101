"""The owner of a replica's adapters, over ranks that only remember their orders, and over a real engine under a storm of calls."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path

import msgspec
import pytest

from cluster.errors import Conflict, InvalidRequest, ModelNotServable, PlatformError, ReplicaLost, Unavailable
from cluster.settings import EngineSettings
from cluster.storage import Storage
from cluster.types import Adapter, Sampling
from deployments.adapters import Adapters, Found, finder
from deployments.engine.checkpoint import inspect
from deployments.engine.lead import lead
from deployments.engine.local import LocalEngine
from deployments.engine.messages import AdapterUse, Request
from deployments.engine.orders import AwaitAdapter, DropAdapter, InstallAdapter, Order, ReadAdapter
from deployments.engine.remote import RemoteEngine
from deployments.engine.rendezvous import Rendezvous
from deployments.engine.shard import Shard
from deployments.engine.shard_spec import ShardSpec
from deployments.slots import Slots
from tests.deployments.engine.families import build
from tests.deployments.engine.lora import LINEARS, plain_adapter, prompts

SETTINGS = EngineSettings(native=False, kv_cache_bytes=1 << 22, threads=1, max_sequences=8, cut_weights_bytes=0)


def adapter(name: str) -> Adapter:
    return Adapter("chat", name, name.encode().hex().ljust(64, "0"))


class Ranks:
    """What ranks do when they are told to: they hold what was installed, and are slow, or fail, where a test says so."""

    def __init__(self) -> None:
        self.orders: list[Order] = []
        self.found: list[str] = []
        self.reading: dict[int, str] = {}
        self.slots: dict[int, str] = {}
        self.slow: set[str] = set()
        self.broken: set[str] = set()
        self.error: PlatformError | None = None

    def find(self, wanted: Adapter) -> Found:
        self.found.append(wanted.name)
        if wanted.name == "missing":
            raise ModelNotServable("no such files")
        return Found(Path(f"/library/{wanted.name}"), 10)

    async def order(self, order: Order) -> None:
        self.orders.append(order)
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        match order:
            case ReadAdapter(slot, directory):
                assert slot not in self.slots, "read over one that was not dropped"
                self.reading[slot] = Path(directory).name
            case AwaitAdapter(slot):
                if self.reading[slot] in self.slow:
                    raise Unavailable("still reading")
            case InstallAdapter(slot):
                name = self.reading.pop(slot)
                if name in self.broken:
                    raise Unavailable("rotten")
                self.slots[slot] = name
            case DropAdapter(slot):
                self.reading.pop(slot, None)
                self.slots.pop(slot, None)

    def count(self, kind: type[Order]) -> int:
        return sum(isinstance(order, kind) for order in self.orders)


def subject(count: int = 2, max_bytes: int = 100) -> tuple[Ranks, Adapters]:
    ranks = Ranks()
    return ranks, Adapters(ranks.find, ranks.order, Slots(count, max_bytes))


async def use(adapters: Adapters, name: str, seconds: float = 0.0) -> int:
    async with adapters.held(adapter(name)) as held:
        assert held
        await asyncio.sleep(seconds)
        return held.slot


async def test_a_herd_loads_once() -> None:
    ranks, adapters = subject()
    ranks.slow = {"german"}
    herd = [asyncio.create_task(use(adapters, "german")) for _ in range(50)]
    await asyncio.sleep(0.03)
    assert adapters.num_waiting == 50
    ranks.slow.clear()
    assert set(await asyncio.gather(*herd)) == {1}
    assert (ranks.found, ranks.count(ReadAdapter), ranks.count(InstallAdapter)) == (["german"], 1, 1)
    await use(adapters, "german")
    assert (ranks.count(ReadAdapter), adapters.num_waiting, adapters.num_loaded) == (1, 0, 1)


async def test_no_adapter_needs_no_rank() -> None:
    ranks, adapters = subject()
    async with adapters.held(None) as held:
        assert held is None
    assert not ranks.orders


@pytest.mark.parametrize("broken", ["rotten", "missing"])
async def test_a_failure_is_told_to_those_who_asked_and_tried_again_by_the_next(broken: str) -> None:
    ranks, adapters = subject()
    ranks.broken = {"rotten"}
    told = await asyncio.gather(*(use(adapters, name) for name in (broken, "good", broken)), return_exceptions=True)
    assert [type(one) for one in told] == [ModelNotServable, int, ModelNotServable]
    assert broken not in ranks.slots.values()
    found = ranks.found.count(broken)
    ranks.broken.clear()
    if broken == "rotten":
        await use(adapters, broken)
        assert ranks.found.count(broken) == found + 1
    assert adapters.num_waiting == 0


async def test_one_in_use_stays_and_the_idle_one_goes() -> None:
    ranks, adapters = subject(count=2)
    async with adapters.held(adapter("a")):
        await use(adapters, "b")
        await use(adapters, "c")
        assert set(ranks.slots.values()) == {"a", "c"}
        async with adapters.held(adapter("c")):
            late = asyncio.create_task(use(adapters, "d"))
            await asyncio.sleep(0.02)
            assert not late.done()
            assert set(ranks.slots.values()) == {"a", "c"}
    await late
    assert "d" in ranks.slots.values()


async def test_who_leaves_the_queue_holds_nobody_up() -> None:
    ranks, adapters = subject(count=1)
    async with adapters.held(adapter("a")):
        gone = asyncio.create_task(use(adapters, "b"))
        stays = asyncio.create_task(use(adapters, "c"))
        await asyncio.sleep(0.01)
        gone.cancel()
    await stays
    assert (set(ranks.slots.values()), ranks.found.count("b"), adapters.num_waiting) == ({"c"}, 1, 0)


async def test_a_caller_who_leaves_while_it_loads_keeps_nothing() -> None:
    ranks, adapters = subject(count=1)
    ranks.slow = {"a"}
    gone = asyncio.create_task(use(adapters, "a"))
    await asyncio.sleep(0.02)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    ranks.slow.clear()
    await use(adapters, "b")
    assert set(ranks.slots.values()) == {"b"}


async def test_what_never_fits_is_refused_by_the_name_of_the_setting() -> None:
    _, small = subject(max_bytes=5)
    with pytest.raises(ModelNotServable, match=r"engine\.adapter_bytes=5"):
        await use(small, "a")
    _, none = subject(count=0)
    with pytest.raises(InvalidRequest, match=r"engine\.max_adapters=0"):
        await use(none, "a")


async def test_the_end_of_the_group_is_told_as_that() -> None:
    ranks, adapters = subject()
    ranks.error = ReplicaLost("rank 1 is gone")
    with pytest.raises(ReplicaLost):
        await use(adapters, "a")


async def test_any_order_of_callers_leaves_nothing_behind() -> None:
    """Twelve adapters in three slots, some broken, some callers gone before their turn."""
    ranks, adapters = subject(count=3, max_bytes=25)
    ranks.broken = {"n4", "n9"}
    numbers = random.Random(0)

    async def call() -> None:
        name = f"n{numbers.randrange(12)}"
        task = asyncio.create_task(use(adapters, name, numbers.random() * 0.004))
        if numbers.random() < 0.3:
            await asyncio.sleep(numbers.random() * 0.01)
            task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(result, (int, asyncio.CancelledError)) or name in ranks.broken, result

    async with asyncio.timeout(30):
        for _ in range(20):
            await asyncio.gather(*(call() for _ in range(15)))
            adapters.slots.check_integrity()
    assert all(not place.holders for place in adapters.slots.places)
    assert {place.slot: place.key for place in adapters.slots.places} == {
        slot: adapter(name).address for slot, name in ranks.slots.items()
    }
    assert not any((adapters.num_waiting, adapters._loading, adapters._asking, adapters._wanted))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[Adapter | None, list[list[int]]]]:
    """A base, a library with four of its adapters, and what is answered with each, and without."""
    root = tmp_path_factory.mktemp("library")
    base, answers = build("llama", root / "base"), {}
    with LocalEngine(base, settings=SETTINGS) as engine:  # one after the other, which is right (engine/test_adapters.py)
        answers[None] = told(engine, None)
        for number in range(4):
            targets = LINEARS[number : number + 3]
            directory = plain_adapter(base, root / f"a{number}", targets=targets, rank=4 + number, seed=number)
            found = Adapter("chat", f"a{number}", Storage(root / "store").publish(directory).address)
            answers[found] = told(engine, engine.put_adapter(1, directory))
    assert len({str(told) for told in answers.values()}) == 5
    return base, root / "store", answers


def told(engine: LocalEngine, use: AdapterUse | None) -> list[list[int]]:
    sampling = Sampling(temperature=0.0, max_tokens=6)
    return [answer.token_ids for answer in engine.generate(prompts(), sampling, adapters=[use] * len(prompts()))]


async def test_a_storm_of_callers_over_a_real_engine_gets_the_right_answers(
    library: tuple[Path, Path, dict[Adapter | None, list[list[int]]]], tmp_path: Path
) -> None:
    """Four adapters in two slots, and callers who leave in the middle."""
    base, store, answers = library
    spec = ShardSpec(base, inspect(base, tp=1, dtype="float32"), 80, 1, SETTINGS, Rendezvous("", 0, 1, 60))
    engine = RemoteEngine(tmp_path / "s.sock")
    await engine.listen()
    shard = await asyncio.to_thread(Shard, spec)
    threading.Thread(target=lead, args=(shard, str(engine.path)), daemon=True).start()
    await engine.connected()
    adapters = Adapters(finder(store, base, "float32"), engine.order, Slots(2, 1 << 20))
    numbers = random.Random(1)

    async def call() -> None:
        wanted, prompt = numbers.choice(list(answers)), numbers.randrange(6)
        leaves_after = numbers.choice([None, None, 1, 3])
        request = Request(engine.next_id(), prompts()[prompt], Sampling(temperature=0.0, max_tokens=6), 6, [], 0)
        told: list[int] = []
        async with adapters.held(wanted) as held:
            assert (held is None) == (wanted is None)
            stream = engine.generate(msgspec.structs.replace(request, adapter=held))
            async for outputs in stream:
                told += [output.token for output in outputs]
                if leaves_after and len(told) >= leaves_after:
                    break
            await stream.aclose()
        assert told == answers[wanted][prompt][: len(told)]
        assert leaves_after or len(told) == 6

    async with asyncio.timeout(100):
        for _ in range(4):
            await asyncio.gather(*(call() for _ in range(15)))
    assert adapters.num_loads > 4, "slots were meant to change hands"
    with pytest.raises(Conflict, match="in use"):
        await _drop_one_in_use(engine, adapters, next(found for found in answers if found))
    engine._writer.close()  # type: ignore[union-attr]


async def _drop_one_in_use(engine: RemoteEngine, adapters: Adapters, wanted: Adapter) -> None:
    """The ranks themselves refuse what the owner never asks."""
    async with adapters.held(wanted) as held:
        assert isinstance(held, AdapterUse)
        request = Request(engine.next_id(), [1, 2, 3], Sampling(temperature=0.0, max_tokens=200), 200, [], 0, adapter=held)
        stream = engine.generate(request)
        await anext(stream)
        try:
            await engine.order(DropAdapter(held.slot))
        finally:
            await stream.aclose()
