"""Limits over HTTP, with the rows in a real store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from cluster.errors import RateLimited
from cluster.settings import GatewaySettings
from cluster.store import Store
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.model_permissions import ModelPermissions, model_permissions
from cluster.tenancy.projects import DEFAULT, projects
from cluster.tenancy.rate_limits import MOST, RateLimit, RateLimits, rate_limits
from cluster.tenancy.rules import STALE_S
from cluster.types import Adapter, Deployment
from deployments.gateway import calls
from deployments.gateway.entrance import Entrance
from deployments.gateway.tenancy import Tenancy, limits_of
from tests.deployments.gateway.conftest import Server, eventually, serving
from tests.fakes import ECHO, EchoModels, KeyRing
from tests.published import check

PROJECT = "/v1/organization/projects/acme"
HELLO: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "one two three"}], "max_completion_tokens": 10}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('limits')}/mmaas.db")
    store.migrate()
    with store.begin() as connection:
        connection.execute(projects.insert().values(id="acme", name="acme", created_at=1.0, organization_id=DEFAULT))
    yield store
    store.close()


@pytest.fixture
def limited(store: Store) -> Iterator[Server]:
    """A gateway whose project `acme` exists; nothing is limited yet."""
    with store.begin() as connection:
        for table in (rate_limits, model_permissions):
            connection.execute(table.delete())
    tenancy = tenancy_over(store)
    with serving(tenancy=tenancy, verify=KeyRing().verify, cache_bytes=1 << 20) as server:
        yield server


def tenancy_over(store: Store) -> Tenancy:
    accounts = Accounts(store, b"pepper")
    return Tenancy(accounts, limits_of(store, accounts, GatewaySettings()))


def put(store: Store, *rows: RateLimit) -> None:
    for row in rows:
        RateLimits(store).put(row)


def test_without_rows_there_is_no_limit_and_no_header(limited: Server) -> None:
    with limited.http() as http:
        answers = [http.post("/v1/chat/completions", json=HELLO) for _ in range(20)]
    assert {answer.status_code for answer in answers} == {200}
    assert not [name for name in answers[0].headers if name.startswith("x-ratelimit")]


def test_requests_beyond_the_limit_are_refused_and_say_when_to_come_back(limited: Server, store: Store) -> None:
    put(store, RateLimit("acme", requests=2))
    with limited.http() as http:
        answers = [http.post("/v1/chat/completions", json=HELLO) for _ in range(3)]
        other = http.get("/v1/models")
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
    assert set(answers[2].json()["error"]) == {"message", "type", "param", "code"}
    assert other.status_code == 200
    with limited.client() as client, pytest.raises(openai.RateLimitError):
        client.chat.completions.create(**HELLO)


def test_streams_and_embeddings_are_counted_with_the_rest(limited: Server, store: Store) -> None:
    put(store, RateLimit("acme", requests=2))
    with limited.client() as client:
        assert list(client.chat.completions.create(**HELLO, stream=True))
        assert client.embeddings.create(model="echo", input="hi", encoding_format="float").data
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**HELLO, stream=True)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="echo", prompt="x")


def test_tokens_are_corrected_to_what_was_used(limited: Server, store: Store) -> None:
    put(store, RateLimit("acme", tokens=50_000))
    with limited.http() as http:
        first = http.post("/v1/chat/completions", json=HELLO | {"max_completion_tokens": 4000})
        second = http.post("/v1/chat/completions", json=HELLO | {"stream": True})
        third = http.post("/v1/chat/completions", json=HELLO)
    assert int(first.headers["x-ratelimit-remaining-tokens"]) < 46_000
    assert int(second.headers["x-ratelimit-remaining-tokens"]) > 49_800
    assert int(third.headers["x-ratelimit-remaining-tokens"]) > 49_800
    assert first.headers["x-ratelimit-limit-tokens"] == "50000"


def test_answers_from_the_cache_take_no_tokens(limited: Server, store: Store) -> None:
    put(store, RateLimit("acme", tokens=1000))
    limited.models.room = 900  # at its worst a call takes nearly everything
    body = {**HELLO, "temperature": 0, "messages": [{"role": "user", "content": "a b"}]}
    del body["max_completion_tokens"]
    with limited.http() as http:
        answers = [http.post("/v1/chat/completions", json=body) for _ in range(30)]
    assert [answer.headers["x-cache"] for answer in answers] == ["miss", *["hit"] * 29]
    assert {answer.status_code for answer in answers} == {200}


def test_a_failed_call_gives_its_tokens_back(limited: Server, store: Store) -> None:
    put(store, RateLimit("acme", tokens=1000))
    with limited.http() as http:
        for _ in range(20):
            assert (
                http.post("/v1/chat/completions", json=HELLO | {"model": "nobody", "max_completion_tokens": 900}).status_code == 404
            )
        limited.models.error = RuntimeError("broken")
        for _ in range(20):
            assert http.post("/v1/chat/completions", json=HELLO | {"max_completion_tokens": 900}).status_code == 500


def test_streams_at_once(limited: Server, store: Store) -> None:
    put(store, RateLimit("acme", streams=2))
    limited.models.delay_s = 0.3
    with limited.client() as client:
        first, second = (client.chat.completions.create(**HELLO, stream=True) for _ in range(2))
        with pytest.raises(openai.RateLimitError) as refusal:
            client.chat.completions.create(**HELLO, stream=True)
        assert refusal.value.response.headers["retry-after"] == "1"
        first.close()
        eventually(lambda: limited.models.open == 1)
        third = client.chat.completions.create(**HELLO, stream=True)
        for stream in (second, third):
            assert list(stream)


def test_who_hangs_up_pays_for_what_was_said(limited: Server, store: Store) -> None:
    put(store, RateLimit("acme", tokens=10_000))
    limited.models.delay_s = 0.2
    with limited.client() as client:
        stream = client.chat.completions.create(**(HELLO | {"max_completion_tokens": 5000}), stream=True)
        next(iter(stream))
        stream.close()
    eventually(lambda: limited.models.open == 0)
    with limited.http() as http:
        left = int(http.post("/v1/chat/completions", json=HELLO).headers["x-ratelimit-remaining-tokens"])
    assert 9800 < left < 9960  # the prompt's bound, a few words, and this call


def test_handles_meet_the_same_limits(limited: Server, store: Store) -> None:
    put(store, RateLimit("acme", requests=2))
    keys = KeyRing()
    entrance = Entrance.of(EchoModels(), keys.verify, GatewaySettings(), tenancy_over(store))

    async def ask() -> list[Any]:
        return [part async for part in calls.call(entrance, KeyRing.USER, "chat.completions", HELLO)]

    async def walk() -> None:
        assert await ask()
        assert await ask()
        with pytest.raises(RateLimited) as refusal:
            await ask()
        assert refusal.value.retry_after_s == pytest.approx(30, abs=1)

    asyncio.run(walk())


def test_models_that_are_not_permitted_do_not_exist(limited: Server, store: Store) -> None:
    limited.models.deployments = [ECHO, Deployment("other", "models:/other@x", created_at=1.0)]
    limited.models.adapted = [Adapter("other", "legal", "a" * 64)]
    ModelPermissions(store).put("acme", "allow_list", ["echo"])
    with limited.http() as http:
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["echo"]
        denied = http.get("/v1/models/other")
        missing = http.get("/v1/models/nobody")
        assert denied.status_code == missing.status_code == 404
        assert denied.text.replace("other", "nobody") == missing.text
        for stream in (False, True):
            for path, body in (("chat/completions", HELLO), ("completions", {"prompt": "x"}), ("embeddings", {"input": "x"})):
                answers = [
                    http.post(f"/v1/{path}", json=body | {"model": model, "stream": stream}) for model in ("other", "nobody")
                ]
                assert {answer.status_code for answer in answers} == {404}
                assert answers[0].text.replace("other", "nobody") == answers[1].text
        assert http.post("/v1/chat/completions", json=HELLO | {"model": "other:legal"}).status_code == 404


@pytest.fixture
def admin(limited: Server) -> Iterator[openai.OpenAI]:
    url = f"{limited.url}/v1"
    with openai.OpenAI(
        base_url=url, api_key="-", admin_api_key=KeyRing.OWNER, max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def test_the_official_client_lists_and_changes_rate_limits(limited: Server, admin: openai.OpenAI) -> None:
    rates = admin.admin.organization.projects.rate_limits
    found = list(rates.list_rate_limits("acme", limit=1))  # two pages
    assert [(limit.id, limit.model, limit.max_requests_per_1_minute) for limit in found] == [
        ("rl-*", "*", MOST),
        ("rl-echo", "echo", MOST),
    ]
    changed = rates.update_rate_limit("rl-echo", project_id="acme", max_requests_per_1_minute=1)
    assert (changed.id, changed.max_requests_per_1_minute, changed.max_tokens_per_1_minute) == ("rl-echo", 1, MOST)
    rates.update_rate_limit("rl-echo", project_id="acme", max_tokens_per_1_minute=5000)
    one = next(limit for limit in rates.list_rate_limits("acme") if limit.id == "rl-echo")
    assert (one.max_requests_per_1_minute, one.max_tokens_per_1_minute) == (1, 5000)
    with limited.http() as http:
        assert [http.post("/v1/chat/completions", json=HELLO).status_code for _ in range(2)] == [200, 429]
    rates.update_rate_limit("rl-echo", project_id="acme", max_requests_per_1_minute=MOST, max_tokens_per_1_minute=MOST)
    with limited.http() as http:
        time.sleep(STALE_S)
        http.post("/v1/chat/completions", json=HELLO)
        eventually(lambda: http.post("/v1/chat/completions", json=HELLO).status_code == 200)


def test_a_limit_of_one_key_has_an_id_of_its_own(limited: Server, admin: openai.OpenAI) -> None:
    rates = admin.admin.organization.projects.rate_limits
    changed = rates.update_rate_limit("rl-*@key_user", project_id="acme", max_requests_per_1_minute=0)
    assert changed.id == "rl-*@key_user"
    assert [limit.id for limit in rates.list_rate_limits("acme")] == ["rl-*", "rl-*@key_user", "rl-echo"]
    with limited.http() as user, limited.http(KeyRing.ADMIN) as other:
        assert user.post("/v1/chat/completions", json=HELLO).status_code == 429
        assert other.post("/v1/chat/completions", json=HELLO).status_code == 200


def test_the_official_client_reads_changes_and_deletes_model_permissions(admin: openai.OpenAI) -> None:
    permissions = admin.admin.organization.projects.model_permissions
    assert (permissions.retrieve("acme").mode, permissions.retrieve("acme").api_model_ids) == ("deny_list", [])
    said = permissions.update("acme", mode="allow_list", model_ids=["echo"])
    assert (said.mode, said.api_model_ids) == ("allow_list", ["echo"])
    assert permissions.retrieve("acme") == said
    assert [permissions.delete("acme").deleted for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("rate_limits/rl-echo", {"max_requests_per_1_minute": -1}, 400, "max_requests_per_1_minute"),
        ("rate_limits/rl-echo", {"max_requests_per_1_minute": "5"}, 400, "max_requests_per_1_minute"),
        ("rate_limits/rl-echo", {"max_tokens_per_1_minute": 1.5}, 400, "max_tokens_per_1_minute"),
        ("rate_limits/rl-echo", {"max_images_per_1_minute": 1}, 400, "max_images_per_1_minute"),
        ("rate_limits/rl-nobody", {}, 404, "rate_limit_id"),
        ("rate_limits/echo", {}, 404, "rate_limit_id"),
        ("rate_limits/rl-echo@a%20b", {"max_tokens_per_1_minute": 1}, 400, "key_id"),
        ("model_permissions", {"mode": "some_list", "model_ids": []}, 400, "mode"),
        ("model_permissions", {"mode": "allow_list"}, 400, "model_ids"),
        ("model_permissions", {"mode": "allow_list", "model_ids": [""]}, 400, "model_ids"),
    ],
)
def test_what_is_wrong_is_said(limited: Server, path: str, body: dict[str, Any], status: int, param: str) -> None:
    with limited.http(KeyRing.OWNER) as http:
        answer = http.post(f"{PROJECT}/{path}", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "limit=99999999999999999999", "after=nothing", "before=rl-x"])
def test_pages_that_are_not_there_are_refused(limited: Server, query: str) -> None:
    with limited.http(KeyRing.OWNER) as http:
        assert http.get(f"{PROJECT}/rate_limits?{query}").status_code == 400


def test_only_administrators_and_only_projects_that_are_there(limited: Server) -> None:
    paths = [
        ("GET", "rate_limits"),
        ("POST", "rate_limits/rl-echo"),
        *((m, "model_permissions") for m in ("GET", "POST", "DELETE")),
    ]
    body = {"mode": "allow_list", "model_ids": []}
    with limited.http() as user, limited.http(KeyRing.OWNER) as admin:
        for method, path in paths:
            assert user.request(method, f"{PROJECT}/{path}", json=body).status_code == 403
            answer = admin.request(method, f"/v1/organization/projects/nobody/{path}", json=body)
            assert answer.status_code == 404


def test_answers_conform_to_the_published_schemas(limited: Server) -> None:
    with limited.http(KeyRing.OWNER) as http:
        check("ProjectRateLimitListResponse", http.get(f"{PROJECT}/rate_limits").json())
        check("ProjectRateLimit", http.post(f"{PROJECT}/rate_limits/rl-echo", json={"max_tokens_per_1_minute": 5}).json())
        check("ProjectModelPermissions", http.get(f"{PROJECT}/model_permissions").json())
        body = {"mode": "deny_list", "model_ids": ["x"]}
        check("ProjectModelPermissions", http.post(f"{PROJECT}/model_permissions", json=body).json())
        check("ProjectModelPermissionsDeleteResponse", http.delete(f"{PROJECT}/model_permissions").json())
