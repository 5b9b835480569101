"""Budgets, limits and revoked keys hold with many callers at once: over HTTP, handles and batches; one gateway on SQLite, three on
Postgres."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from bench.gateway_kills import PRICES, Place
from bench.gateways import MODEL, Gateways
from cluster.errors import BudgetExceeded
from cluster.settings import Settings
from cluster.store import Store
from cluster.tenancy.budgets import Budgets
from cluster.tenancy.rate_limits import RateLimit
from cluster.tenancy.reconcile import problems
from deployments.gateway import calls
from deployments.gateway.app import build_app
from deployments.gateway.entrance import Entrance
from deployments.gateway.tenancy import Tenancy
from deployments.gateway.wire import Wire
from tests.cluster.conftest import postgres_url  # noqa: F401 - a fixture
from tests.fakes import EchoModels

CALLERS = 64
PROMPT = "one two three four"
WORST = (len(PROMPT) + 32) * 2 + 8 * 5
"""Micro-units that one of the calls below reserves: the bound of its prompt, and of eight tokens."""


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    is_sqlite = request.param == "sqlite"
    url = None if is_sqlite else request.getfixturevalue("postgres_url")
    place = Place(Settings(home=tmp_path, database_url=url, gateway={"replicas": 1 if is_sqlite else 3}))
    yield place
    place.store.downgrade("base")
    place.store.close()


@pytest.fixture
def three(place: Place) -> Iterator[Gateways]:
    """Gateways in processes of their own; three on Postgres."""
    with Gateways(place.settings, place.settings.gateway.replicas) as started:
        yield started


@dataclass(frozen=True)
class Entered:
    entrance: Entrance
    url: str


@contextlib.asynccontextmanager
async def entered(settings: Settings) -> AsyncIterator[Entered]:
    """A gateway in this event loop, so that it can be called over a handle, too."""
    store = Store(settings.store_url)
    tenancy = Tenancy.of(store, settings)
    assert tenancy.accounts is not None
    assert tenancy.metering is not None
    models = EchoModels()
    models.delay_s = 0.005
    app = build_app(models, tenancy.accounts.keys.verify, settings.gateway, tenancy=tenancy)
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, http=Wire, lifespan="off"))
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        try:
            yield Entered(app.state.entrance, f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            await serving
            await tenancy.metering.close()
            store.close()


async def test_sixty_four_callers_over_http_handles_and_batches_never_pass_a_budget(place: Place) -> None:
    project, key, budget = place.projects[0], place.keys[0], CALLERS * WORST
    limits, rng, ends = Budgets(place.store), random.Random(1), Counter[str]()
    limits.set("project", project, "total", budget)
    async with contextlib.AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(entered(place.settings)) for _ in range(place.settings.gateway.replicas)]
        client = await stack.enter_async_context(httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=120))

        async def until_refused(number: int) -> None:
            refused = 0
            while refused < 3:
                ask, way = rng.choice([over_http, over_handle]), rng.choice(["whole", "stream", "batch"])
                end = await ask(gateways[number % len(gateways)], client, key, way)
                ends[end] += 1
                assert not place.passed()
                if end == "refused":
                    refused += 1
                    await asyncio.sleep(0.05)

        for ask in (over_http, over_handle):
            assert [await ask(gateways[0], client, key, way) for way in ("whole", "stream", "batch")] == ["answered"] * 3
        await asyncio.gather(*(until_refused(number) for number in range(CALLERS)))
    balance = limits.balance("project", project, time.time())
    assert balance.held == 0
    assert budget / 2 < balance.spent <= budget
    assert ends["answered"] > 10
    assert ends["refused"] == 3 * CALLERS
    assert problems(place.store) == []


def body(way: str) -> tuple[str, dict[str, Any]]:
    """Of one call, or of one with sixteen prompts, each of which is a call of the model."""
    if way == "batch":
        return "completions", {"model": "echo", "prompt": [PROMPT] * 16, "max_tokens": 8}
    messages = [{"role": "user", "content": PROMPT}]
    return "chat.completions", {"model": "echo", "messages": messages, "max_tokens": 8, "stream": way == "stream"}


async def over_http(gateway: Entered, client: httpx.AsyncClient, key: str, way: str) -> str:
    operation, asked = body(way)
    answer = await client.post(f"{gateway.url}/v1/{operation.replace('.', '/')}", json=asked)
    if answer.status_code == 429:
        assert answer.json()["error"]["code"] == "insufficient_quota"
        return "refused"
    assert answer.status_code == 200
    assert way != "stream" or answer.text.endswith("data: [DONE]\n\n")
    return "answered"


async def over_handle(gateway: Entered, client: httpx.AsyncClient, key: str, way: str) -> str:
    operation, asked = body(way)
    try:
        return "answered" if [part async for part in calls.call(gateway.entrance, key, operation, asked)] else "nothing"
    except BudgetExceeded:
        return "refused"


def test_gateways_share_the_limits_of_requests_and_tokens(place: Place, three: Gateways) -> None:
    """No more than the limit is let in at once, and then what leaks: docs/accounts-limits.md."""
    requests, tokens = 120, 1200
    rows = place.accounts.rate_limits
    rows.put(RateLimit(place.projects[0], requests=requests))
    rows.put(RateLimit(place.projects[1], tokens=tokens))
    time.sleep(1.1)  # when a change holds everywhere
    by_request, by_token, seconds = asyncio.run(flood(place, three, 6.0))
    assert requests / 2 <= by_request <= requests * (1 + seconds / 60)
    assert tokens / 4 <= by_token <= tokens * (1 + seconds / 60)


async def flood(place: Place, gateways: Gateways, seconds: float) -> tuple[int, int, float]:
    """Requests that the first project was let in with, tokens that the second used, in how many seconds."""
    let_in, used, start = 0, 0, time.monotonic()

    async def ask(number: int, client: httpx.AsyncClient) -> None:
        nonlocal let_in, used
        project = number % 2
        asked = {"model": MODEL.name, "messages": [{"role": "user", "content": "n 0"}], "max_tokens": 5}
        url = f"{gateways[number % len(gateways)].url}/v1/chat/completions"
        while time.monotonic() - start < seconds:
            answer = await client.post(url, json=asked, headers={"Authorization": f"Bearer {place.keys[project]}"})
            if answer.status_code != 200:  # 503: nobody is let in on a guess while the database is too slow to tell
                assert answer.status_code == 429 or answer.json()["error"]["code"] == "limits_unavailable", answer.text
                assert 0 < float(answer.headers["retry-after"]) <= 120
                await asyncio.sleep(0.05)
            elif project:
                used += answer.json()["usage"]["total_tokens"]
            else:
                let_in += 1

    async with httpx.AsyncClient(timeout=60) as client:
        await asyncio.gather(*(ask(number, client) for number in range(24)))
    return let_in, used, time.monotonic() - start


def test_a_revoked_key_dies_on_every_gateway_within_a_second(place: Place, three: Gateways) -> None:
    key_id, key = place.accounts.keys.create(place.projects[0], "short-lived")
    seen: list[tuple[float, int]] = []

    async def watch(url: str, end: float) -> None:
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
            while time.monotonic() < end:
                seen.append((time.monotonic(), (await client.get(f"{url}/v1/models")).status_code))
                await asyncio.sleep(0.02)

    async def revoke() -> float:
        await asyncio.sleep(1.0)
        await asyncio.to_thread(place.accounts.keys.revoke, key_id)
        return time.monotonic()

    async def both() -> float:
        revoked, *_ = await asyncio.gather(revoke(), *(watch(each.url, time.monotonic() + 4) for each in three))
        return revoked

    revoked = asyncio.run(both())
    assert {status for at, status in seen if at < revoked - 0.5} == {200}
    assert {status for at, status in seen if at >= revoked + 1.0} == {401}, "asked a second after the revocation"


def test_what_is_reserved_is_what_the_test_takes_it_for() -> None:
    from cluster.tenancy.metered import Metered
    from cluster.tenancy.rating import at_most

    assert at_most(PRICES, "echo", Metered(input_tokens=len(PROMPT) + 32, output_tokens=8)) == WORST
