"""Several gateways, one limit. Time is what the test says, the pools are in memory or in a real store."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import Unavailable
from cluster.store import Store
from cluster.tenancy.counts import Want
from cluster.tenancy.gcra import MINUTE_US
from cluster.tenancy.pools import SLOT_S, StoredPools, rate_pools, stream_leases
from cluster.tenancy.shares import Shares
from tests.fakes import MemoryPools


@pytest.fixture
def store(migrated: Store) -> Store:
    with migrated.begin() as connection:
        for table in (rate_pools, stream_leases):
            connection.execute(table.delete())
    return migrated


class Cluster:
    """Gateways that share pools, and a clock."""

    def __init__(self, gateways: int = 3) -> None:
        self.now_us = 10**12
        self.pools = MemoryPools(lambda: self.now_us)
        self.gateways = [Shares(self.pools, gateways, lambda: self.now_us / 1e6) for _ in range(gateways)]

    def pass_us(self, us: int) -> None:
        self.now_us += us

    async def call(self, gateway: int, want: Want) -> bool:
        """Whether it was let in."""
        shares = self.gateways[gateway]
        await shares.prepare([want])
        if shares.wait_us(want):
            return False
        shares.spend(want)
        return True

    async def renew(self) -> None:
        for shares in self.gateways:
            await shares.renew()

    async def close(self) -> None:
        for shares in self.gateways:
            await shares.aclose()


calls = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3_000_000), st.integers(1, 40)), min_size=1, max_size=80)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 400), calls)
def test_three_gateways_together_let_no_window_have_more(limit: int, calls: list[tuple[int, int, int]]) -> None:
    async def walk() -> None:
        cluster, taken = Cluster(), []
        for number, (gateway, pause, units) in enumerate(calls):
            cluster.pass_us(pause)
            if number % 7 == 0:
                await cluster.renew()
            if await cluster.call(gateway, Want("tokens", "tokens:a/*/*", limit, units)):
                taken.append((cluster.now_us, units))
        await cluster.close()
        for first, (start, _) in enumerate(taken):
            spent = 0
            for end, units in taken[first:]:
                spent += units
                assert spent * MINUTE_US <= limit * MINUTE_US + limit * (end - start)

    asyncio.run(walk())


def test_what_gateways_hold_is_part_of_the_burst() -> None:
    async def walk() -> None:
        cluster, want, limit = Cluster(), Want("requests", "requests:a/*/*", 2400), 2400
        for number in range(300):  # ten a second each: the pool stays full while each holds something
            cluster.pass_us(100_000)
            for gateway in range(3):
                assert await cluster.call(gateway, want)
            if number % 3 == 0:
                await cluster.renew()
        held = sum(shares._share(want).units for shares in cluster.gateways)
        assert held > 10
        cluster.pass_us(500_000)
        taken = [await cluster.call(gateway, want) for gateway in range(3) for _ in range(limit)]
        await cluster.close()
        assert sum(taken) <= limit

    asyncio.run(walk())


@pytest.mark.parametrize("limit", [6, 60, 600])
def test_gateways_that_all_want_more_use_the_limit_up_and_none_starves(limit: int) -> None:
    async def walk() -> None:
        cluster, got, want = Cluster(), Counter[int](), Want("requests", "requests:a/*/*", limit)
        step = MINUTE_US // limit // 4  # each gateway wants four times the whole limit
        for number in range(limit * 4 * 5):
            cluster.pass_us(step)
            for gateway in [(number + k) % 3 for k in range(3)]:
                got[gateway] += await cluster.call(gateway, want)
            if number % 50 == 0:
                await cluster.renew()
        await cluster.close()
        assert 4.9 * limit <= sum(got.values()) <= 6 * limit
        assert min(got.values()) >= sum(got.values()) / 6

    asyncio.run(walk())


def test_steady_calls_do_not_wait_for_the_database() -> None:
    async def walk() -> None:
        cluster, want = Cluster(), Want("requests", "requests:a/*/*", 60_000)
        waited = 0
        for number in range(3000):
            cluster.pass_us(5000)  # 200 a second
            before = cluster.gateways[0]._share(want).units
            assert await cluster.call(0, want)
            waited += before < 1
            if number % 10 == 0:
                await asyncio.sleep(0.001)  # the transaction beside the calls gets its turn
        assert waited <= 60, "the first second builds the share up; later calls never wait"
        assert cluster.pools.draws < 3000 / 5
        await cluster.close()

    asyncio.run(walk())


def test_refusals_are_said_from_memory() -> None:
    async def walk() -> None:
        cluster, want = Cluster(), Want("requests", "requests:a/*/*", 4)
        results = [await cluster.call(0, want) for _ in range(500)]
        assert sum(results) == 4
        assert cluster.pools.draws <= 6
        assert 0 < cluster.gateways[0].wait_us(want) <= 15_000_000
        await cluster.close()

    asyncio.run(walk())


def test_calls_that_come_together_share_one_transaction() -> None:
    async def walk() -> None:
        cluster, want = Cluster(), Want("requests", "requests:a/*/*", 1000)
        assert sum(await asyncio.gather(*(cluster.call(0, want) for _ in range(100)))) == 100
        assert cluster.pools.draws <= 4
        await cluster.close()

    asyncio.run(walk())


def test_what_a_gateway_does_not_need_goes_back() -> None:
    async def walk() -> None:
        cluster, want = Cluster(), Want("tokens", "tokens:a/*/*", 1000, 700)
        assert await cluster.call(0, want)
        assert not await cluster.call(1, want)
        cluster.gateways[0].give(want, 690)
        cluster.pass_us(1_200_000)
        await cluster.renew()
        assert await cluster.call(1, want)
        await cluster.close()

    asyncio.run(walk())


def test_what_was_spent_beyond_is_owed_by_all() -> None:
    async def walk() -> None:
        cluster, want = Cluster(), Want("tokens", "tokens:a/*/*", 1000, 100)
        assert await cluster.call(0, want)
        cluster.gateways[0].give(want, -2000)
        await cluster.renew()
        assert not await cluster.call(1, want)
        cluster.pass_us(2 * MINUTE_US)
        assert await cluster.call(1, want)
        await cluster.close()

    asyncio.run(walk())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=60))
def test_streams_of_all_gateways_are_never_more_than_the_limit(limit: int, moves: list[tuple[int, bool]]) -> None:
    async def walk() -> None:
        cluster, want, running = Cluster(), Want("streams", "streams:a/*/*", limit), Counter[int]()
        for gateway, starts in moves:
            cluster.pass_us(100_000)
            if starts:
                running[gateway] += await cluster.call(gateway, want)
            elif running[gateway]:
                cluster.gateways[gateway].give(want, 1)
                running[gateway] -= 1
            assert sum(running.values()) <= limit
        cluster.pass_us(2_000_000)
        await cluster.renew()
        while sum(running.values()) < limit:
            cluster.pass_us(1_000_000)
            assert await cluster.call(0, want), "free slots come back to whoever wants them"
            running[0] += 1
        await cluster.close()

    asyncio.run(walk())


def test_a_database_that_fails_is_said_and_nothing_is_lost() -> None:
    async def walk() -> None:
        cluster, want = Cluster(), Want("requests", "requests:a/*/*", 100)
        cluster.pools.error = OSError("away")
        with pytest.raises(Unavailable) as refusal:
            await cluster.call(0, want)
        assert refusal.value.public_code == "limits_unavailable"
        cluster.pools.error = None
        assert sum([await cluster.call(0, want) for _ in range(100)]) == 100 - 3 * (25 // 3)
        await cluster.close()

    asyncio.run(walk())


def test_three_gateways_over_a_real_store(store: Store) -> None:
    async def walk() -> None:
        gateways = [Shares(StoredPools(store), 3) for _ in range(3)]
        want, other = Want("requests", "requests:a/*/*", 120), Want("tokens", "tokens:a/*/*", 12_000, 50)

        async def caller(shares: Shares) -> int:
            got = 0
            for _ in range(60):
                await shares.prepare([want, other])
                if not shares.wait_us(want) and not shares.wait_us(other):
                    shares.spend(want)
                    shares.spend(other)
                    shares.give(other, 40)
                    got += 1
            return got

        start = asyncio.get_running_loop().time()
        got = sum(await asyncio.gather(*(caller(shares) for shares in gateways for _ in range(4))))
        elapsed = asyncio.get_running_loop().time() - start
        assert 60 <= got <= 120 + 2 * elapsed
        for shares in gateways:
            await shares.aclose()

    asyncio.run(walk())


SPENDER = """
import asyncio, sys, time
from cluster.store import Store
from cluster.tenancy.counts import Want
from cluster.tenancy.pools import StoredPools
from cluster.tenancy.shares import Shares

async def main():
    shares, got, waits = Shares(StoredPools(Store(sys.argv[1])), 3), 0, []
    want = Want("requests", "requests:processes/*/*", int(sys.argv[2]))
    print("ready", flush=True)
    sys.stdin.readline()
    end = time.monotonic() + 2
    while time.monotonic() < end:
        await shares.prepare([want])
        if not shares.wait_us(want):
            shares.spend(want)
            got += 1
        await asyncio.sleep(0.002)
    await shares.aclose()
    print(got, flush=True)

asyncio.run(main())
"""


def test_gateways_in_processes_of_their_own_share_one_database(store: Store) -> None:
    if store.is_sqlite:
        pytest.skip("several gateways need Postgres")
    limit, url = 300, store.url.render_as_string(hide_password=False)
    processes = [
        subprocess.Popen([sys.executable, "-c", SPENDER, url, str(limit)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    try:
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        start = time.monotonic()
        for process in processes:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        got = [int(process.communicate(timeout=60)[0]) for process in processes]
        elapsed = time.monotonic() - start
    finally:
        for process in processes:
            process.kill()
    assert limit // 2 <= sum(got) <= limit + limit * elapsed / 60
    assert min(got) >= limit // 20, "each gets a part"


def test_slots_of_a_gateway_that_died_come_free(store: Store) -> None:
    now, want = [10**12], Want("streams", "streams:a/*/*", 2)

    async def walk() -> None:
        dead, alive = (Shares(StoredPools(store, lambda _: now[0]), 2, lambda: now[0] / 1e6) for _ in range(2))
        for _ in range(2):
            await dead.prepare([want])
            assert dead.wait_us(want) == 0
            dead.spend(want)
        await alive.prepare([want])
        assert alive.wait_us(want) > 0
        now[0] += round(SLOT_S * 1e6 * 0.9)
        await dead.renew()
        if dead._ticking:
            dead._ticking.cancel()  # it dies
        now[0] += round(SLOT_S * 1e6 * 0.9)
        await alive.prepare([want])
        assert alive.wait_us(want) > 0, "it said in time that it lives"
        now[0] += round(SLOT_S * 1e6)
        await alive.prepare([want])
        assert alive.wait_us(want) == 0
        if alive._ticking:
            alive._ticking.cancel()

    asyncio.run(walk())


def test_a_jump_of_the_databases_clock_blocks_nobody_and_gives_a_burst_at_most(store: Store) -> None:
    now, real = [10**15], [0.0]
    want = Want("requests", "requests:a/*/*", 40)

    async def taken(shares: Shares) -> int:
        got = 0
        for _ in range(100):
            await shares.prepare([want])
            if shares.wait_us(want) == 0:
                shares.spend(want)
                got += 1
        return got

    async def walk() -> None:
        shares = Shares(StoredPools(store, lambda _: now[0]), 1, lambda: real[0])
        assert await taken(shares) == 30
        for jump in itertools.islice(itertools.cycle((-(10**12), 10**12)), 4):
            now[0] += jump
            real[0] += 1.0
            assert await taken(shares) <= 30
        now[0] -= 10**13
        for _ in range(60):
            now[0] += 1_000_000
            real[0] += 1.0
            await shares.renew()
        assert await taken(shares) >= 29
        await shares.aclose()

    asyncio.run(walk())
