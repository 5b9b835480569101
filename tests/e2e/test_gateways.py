"""Three replicas of the gateway behind HAProxy, on Postgres: one budget and one limit, whoever is asked."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cluster import launch
from cluster.store import Store
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.budgets import Budgets
from cluster.tenancy.rate_limits import RateLimit
from cluster.tenancy.reconcile import problems
from tests.cluster.conftest import postgres_url  # noqa: F401 - a fixture
from tests.deployments.engine.families import build
from tests.e2e.platform import MODEL, RunningPlatform, private_environment

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(500)]

CALLERS, TOKENS, PRICE = 24, 4, 1000
"""At once; of an answer; micro-units for each of these."""
BUDGET = 60 * TOKENS * PRICE


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> Iterator[RunningPlatform]:  # noqa: F811
    root = tmp_path_factory.mktemp("gateways")
    directory = build("llama", root / "model")
    more = {"MMAAS_DATABASE_URL": postgres_url, "MMAAS_GATEWAY__REPLICAS": "3"}
    running = RunningPlatform(private_environment(root / "home") | more)
    try:
        running.mmaas("up", "--model", str(directory), "--name", MODEL, timeout=280)
        yield running
    finally:
        running.mmaas("down")
        store = Store(postgres_url)
        store.downgrade("base")
        store.close()


@pytest.fixture(scope="module")
def store(three: RunningPlatform) -> Iterator[Store]:
    store = Store(three.settings.store_url)
    yield store
    store.close()


async def asked(platform: RunningPlatform, each: int) -> Counter[int]:
    """Statuses: every caller asks over connections of its own, so that each call may come to another replica."""
    url, key = f"{platform.quickstart['base_url']}/chat/completions", platform.quickstart["api_key"]
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": TOKENS, "ignore_eos": True}
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=120, limits=limits, trust_env=False) as client:

        async def ask() -> list[int]:
            return [(await client.post(url, json=body)).status_code for _ in range(each)]

        return Counter(status for each in await asyncio.gather(*(ask() for _ in range(CALLERS))) for status in each)


def gateways(platform: RunningPlatform) -> list[int]:
    family = launch.family(platform.settings)
    return [process.pid for process in family if "ServeReplica:gateway:" in " ".join(process.cmdline())]


def test_three_replicas_never_pass_one_budget(three: RunningPlatform, store: Store, tmp_path: Path) -> None:
    assert len(gateways(three)) == 3
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"charges": [{"meter": "output_tokens", "price": str(PRICE), "per": 1_000_000}]}))
    three.mmaas("prices", "publish", str(prices))
    three.mmaas("budgets", "set", str(BUDGET / 1e6), "--period", "total")
    statuses = asyncio.run(asked(three, each=5))
    balance = Budgets(store).balance("project", "default", time.time())
    assert statuses.keys() == {200, 429}
    assert balance.held == 0
    assert balance.spent == statuses[200] * TOKENS * PRICE <= BUDGET
    assert balance.spent > BUDGET / 2
    assert problems(store) == []
    three.mmaas("budgets", "set", "none", "--period", "total")


def test_three_replicas_let_no_more_in_than_one_limit(three: RunningPlatform, store: Store) -> None:
    limit = 40
    Accounts(store, b"").rate_limits.put(RateLimit("default", requests=limit))
    time.sleep(1.1)  # when a change holds everywhere
    began = time.monotonic()
    statuses = asyncio.run(asked(three, each=5))
    assert statuses.keys() == {200, 429}
    assert limit / 2 <= statuses[200] <= limit * (1 + (time.monotonic() - began) / 60) + 1
