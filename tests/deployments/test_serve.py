"""The gateway on a real local Serve in front of a real deployment `LLM`: over HTTP, over a handle, and through failures."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster import errors
from cluster.settings import Settings
from cluster.types import Chunk, Generate
from deployments.gateway.front import CALLBACK
from mmaas.client import connect
from tests.deployments.gateway.conftest import eventually
from tests.fakes import ECHO, EchoModels, KeyRing
from tests.free_ports import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
HELLO = [{"role": "user", "content": "one two three"}]


class LLM:
    """Answers as the engine does, by handle; a message can ask it to fail, to wait or to die."""

    def __init__(self) -> None:
        self._echo = EchoModels()

    async def generate(self, request: Generate) -> AsyncGenerator[Chunk, None]:
        said = request.messages[-1].content.split(" ") if request.messages else []
        self._echo.delay_s = 60 if "wait" in said else 0
        self._echo.error = errors.ContextLengthExceeded("9 tokens, 8 fit", param="messages") if "fail" in said else None
        self._echo.fail_after = 1 if "late" in said else 0
        async for chunk in self._echo.generate("echo", request):
            yield chunk
            if "die" in said:
                await asyncio.sleep(0.5)  # for the chunk to arrive
                os._exit(1)

    async def stats(self) -> dict[str, int]:
        return {"open": self._echo.open}

    async def info(self) -> dict[str, int]:
        return {"max_model_len": 64}


def parts(settings: Settings) -> tuple[Any, Any, Any]:
    """In the place of the store: one model, and the keys of the fakes."""
    from deployments.gateway.tenancy import Tenancy
    from deployments.router import ServeModels

    return ServeModels(lambda: [ECHO]), KeyRing().verify, Tenancy()


def deploy_model() -> None:
    from ray import serve

    model = serve.deployment(LLM, name="LLM", ray_actor_options={"num_cpus": 0}, health_check_period_s=1)
    serve.run(model.bind(), name="model-echo", route_prefix=None)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    monkeypatch = pytest.MonkeyPatch()
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", CALLBACK)
    import ray
    from ray import serve

    from deployments.gateway import gateway

    port = free_port()
    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", object_store_memory=100 << 20, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    deploy_model()
    settings = Settings(home=home, gateway={"port": port, "max_stream_s": 20})
    serve.run(gateway.build(settings, parts), name="gateway", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
    monkeypatch.undo()


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KeyRing.USER, max_retries=0, _strict_response_validation=True) as client:
        yield client


def open_streams() -> int:
    from ray import serve

    stats: dict[str, int] = serve.get_deployment_handle("LLM", app_name="model-echo").stats.remote().result(timeout_s=10)
    return stats["open"]


def test_the_official_client_gets_answers_and_streams(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="echo", messages=HELLO, n=2)
    assert [choice.message.content for choice in raw.parse().choices] == ["one two three"] * 2
    assert len(raw.headers.get_list("x-request-id")) == 1
    assert raw.headers["x-request-id"].startswith("req_")
    chunks = list(client.chat.completions.create(model="echo", messages=HELLO, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two three"
    assert [model.id for model in client.models.list()] == ["echo"]


def test_errors_keep_their_kind_through_ray(client: openai.OpenAI) -> None:
    for text, stream in (("fail", False), ("fail", True)):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="echo", messages=[{"role": "user", "content": text}], stream=stream)
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=HELLO)
    broken = client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "fail late"}], stream=True)
    with pytest.raises(openai.APIError) as late:
        list(broken)
    assert late.value.code == "context_length_exceeded"


def test_readiness_and_scopes(url: str) -> None:
    with httpx.Client(base_url=url, timeout=20) as http:
        assert http.get("/ready").json() == {"ready": True, "models": {"echo": True}, "asleep": []}
        assert http.get("/v1/models").status_code == 401
        assert http.get("/metrics", headers={"authorization": f"Bearer {KeyRing.ADMIN}"}).status_code == 200


def test_serves_control_headers_have_no_effect(url: str) -> None:
    body = {"model": "echo", "messages": HELLO}
    hostile = {
        "authorization": f"Bearer {KeyRing.USER}",
        "x-request-timeout-seconds": "0.0001",
        "x-request-disconnect-disabled": "?1",
        "serve_multiplexed_model_id": "x",
        "x-request-id": "theirs",
    }
    with httpx.Client(base_url=url, timeout=20) as http:
        for _ in range(5):
            answer = http.post("/v1/chat/completions", json=body, headers=hostile)
            assert answer.status_code == 200
            assert answer.headers.get_list("x-request-id") != ["theirs"]
            assert len(answer.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_over_http_frees_the_model(url: str, stream: bool) -> None:
    body = {"model": "echo", "messages": [{"role": "user", "content": "wait"}], "stream": stream}
    headers = {"authorization": f"Bearer {KeyRing.USER}", "x-request-disconnect-disabled": "?1"}
    with httpx.Client(base_url=url, headers=headers, timeout=1) as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/chat/completions", json=body)
    eventually(lambda: open_streams() == 0, 8)


def test_the_same_calls_over_a_handle(url: str) -> None:
    with connect(api_key=KeyRing.USER) as client:
        assert client.chat.completions.create(model="echo", messages=HELLO).choices[0].message.content == "one two three"
        chunks = client.chat.completions.create(model="echo", messages=HELLO, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two three"
        assert client.models.retrieve("echo").id == "echo"
        with pytest.raises(errors.ContextLengthExceeded) as refused:
            client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "fail"}])
        assert refused.value.param == "messages"
    with connect(api_key="mk_wrong") as stranger, pytest.raises(errors.Unauthenticated):
        stranger.models.list()


def test_dropping_a_stream_over_a_handle_frees_the_model(url: str) -> None:
    with connect(api_key=KeyRing.USER) as client:
        stream = client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "wait"}], stream=True)
        next(stream)
        assert open_streams() == 1
        del stream
        eventually(lambda: open_streams() == 0, 8)


def test_the_example_job_streams(url: str, tmp_path: Path) -> None:
    import ray

    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "MMAAS_API_KEY": KeyRing.USER}
    command = [sys.executable, str(ROOT / "examples" / "chat_job.py"), "one", "two"]
    job = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert job.stdout.strip() == "one two", job.stderr


def test_a_lost_replica_ends_its_stream_with_an_error_and_the_next_call_answers(client: openai.OpenAI) -> None:
    broken = client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "die now"}], stream=True)
    with pytest.raises(openai.APIError) as lost:
        list(broken)
    assert lost.value.code == "replica_lost"
    patient = client.with_options(max_retries=8)  # a 503 with Retry-After is what the official client waits for
    assert patient.chat.completions.create(model="echo", messages=HELLO).choices[0].message.content == "one two three"


def test_a_model_that_is_gone_is_a_503_and_answers_when_it_is_back(url: str, client: openai.OpenAI) -> None:
    from ray import serve

    serve.delete("model-echo")
    with pytest.raises(openai.InternalServerError) as absent:
        client.chat.completions.create(model="echo", messages=HELLO)
    assert (absent.value.status_code, absent.value.code) == (503, "model_unavailable")
    assert "retry-after" in absent.value.response.headers
    eventually(lambda: httpx.get(f"{url}/ready").status_code == 503)
    deploy_model()
    eventually(lambda: httpx.get(f"{url}/ready").status_code == 200)
    assert client.chat.completions.create(model="echo", messages=HELLO).choices[0].message.content == "one two three"
