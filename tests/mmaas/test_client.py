"""The client over both transports. The handle here is the gateway's own `call` without Serve; test_serve.py has the real one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cluster import errors
from cluster.settings import GatewaySettings
from deployments.gateway import calls
from deployments.gateway.entrance import Entrance
from mmaas.client import Client, connect
from mmaas.transport import events, from_envelope
from tests.deployments.gateway.conftest import Server, eventually, serving
from tests.fakes import EchoModels, KeyRing

HELLO = [{"role": "user", "content": "one two three"}]


class Handle:
    """A gateway's handle, as Serve gives it: synchronous iteration over a generator that runs on another thread's loop."""

    def __init__(self, entrance: Entrance, loop: asyncio.AbstractEventLoop) -> None:
        self._entrance, self._loop = entrance, loop

    def options(self, *, method_name: str, stream: bool) -> Handle:
        assert (method_name, stream) == ("call", True)
        return self

    def remote(self, *args: Any) -> HandleAnswer:
        return HandleAnswer(calls.call(self._entrance, *args), self._loop)


class HandleAnswer:
    def __init__(self, stream: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._stream, self._loop = stream, loop

    def __iter__(self) -> HandleAnswer:
        return self

    def __next__(self) -> Any:
        try:
            return asyncio.run_coroutine_threadsafe(anext(self._stream), self._loop).result(10)
        except StopAsyncIteration:
            raise StopIteration from None

    def cancel(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stream.aclose(), self._loop).result(10)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(max_body_bytes=4096) as server:
        yield server


@pytest.fixture(params=["http", "handle"])
def both(request: pytest.FixtureRequest, server: Server, loop: asyncio.AbstractEventLoop) -> Any:
    """A function that connects with a key, and the models behind the connection."""
    models = EchoModels()
    if request.param == "http":
        vars(server.models).update(vars(models))
        return lambda key=KeyRing.USER: connect(base_url=server.url, api_key=key), server.models
    entrance = Entrance.of(models, KeyRing().verify, GatewaySettings(max_body_bytes=4096))
    return lambda key=KeyRing.USER: connect(Handle(entrance, loop), api_key=key), models


@pytest.fixture
def client(both: Any) -> Iterator[Client]:
    with both[0]() as client:
        yield client


def test_chat_answers_whole_and_as_a_stream(client: Client) -> None:
    answer = client.chat.completions.create(model="echo", messages=HELLO, n=2)
    assert [choice.message.content for choice in answer.choices] == ["one two three"] * 2
    assert answer.usage.total_tokens == 13
    chunks = list(client.chat.completions.create(model="echo", messages=HELLO, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == "one two three"
    assert chunks[-1].usage is not None
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_completions_and_models(client: Client) -> None:
    assert [choice.text for choice in client.completions.create(model="echo", prompt=["a", "b"]).choices] == ["a", "b"]
    streamed = client.completions.create(model="echo", prompt="a b", stream=True, logprobs=1)
    assert [token for chunk in streamed if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens] == ["a", " b"]
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").owned_by == "mmaas"


@pytest.mark.parametrize("stream", [False, True])
def test_both_ways_raise_the_same_errors(both: Any, stream: bool) -> None:
    make, models = both
    with make() as client:
        create = client.chat.completions.create
        with pytest.raises(errors.ModelNotFound) as missing:
            create(model="other", messages=HELLO, stream=stream)
        assert (missing.value.param, missing.value.public_code) == ("model", "model_not_found")
        with pytest.raises(errors.InvalidRequest) as wrong:
            create(model="echo", messages=HELLO, stream=stream, temperature=9)
        assert wrong.value.param == "temperature"
        with pytest.raises(errors.PayloadTooLarge):
            create(model="echo", messages=[{"role": "user", "content": "x" * 5000}], stream=stream)
        models.error = errors.Overloaded("full", retry_after_s=3.0)
        with pytest.raises(errors.Overloaded) as full:
            create(model="echo", messages=HELLO, stream=stream)
        assert full.value.retry_after_s == 3.0
        models.error = RuntimeError("/secret")
        with pytest.raises(errors.PlatformError, match="req_") as fault:
            create(model="echo", messages=HELLO, stream=stream)
        assert (type(fault.value), fault.value.status) == (errors.PlatformError, 500)
        with pytest.raises(errors.ModelNotFound):
            client.models.retrieve("other")
    for key, kind in (("mk_wrong", errors.Unauthenticated), ("mk_no_scope_012345", errors.Forbidden)):
        with make(key) as client, pytest.raises(kind):
            client.chat.completions.create(model="echo", messages=HELLO, stream=stream)
        with make(key) as client, pytest.raises(kind):
            client.models.list()


def test_a_stream_that_breaks_raises_after_what_came(both: Any) -> None:
    make, models = both
    models.error, models.fail_after = errors.ReplicaLost("the shard group died"), 1
    with make() as client:
        stream = client.chat.completions.create(model="echo", messages=HELLO, stream=True)
        assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "one"]
        with pytest.raises(errors.ReplicaLost, match="shard group"):
            next(stream)


@pytest.mark.parametrize("started", [False, True])
def test_dropping_a_stream_frees_the_model(both: Any, started: bool) -> None:
    make, models = both
    models.delay_s = 60
    with make() as client:
        stream = client.chat.completions.create(model="echo", messages=HELLO, stream=True)
        if started:
            next(stream)
        eventually(lambda: models.open == 1)
        del stream
        eventually(lambda: models.open == 0)


def test_a_connection_needs_a_key_and_a_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMAAS_API_KEY", raising=False)
    with pytest.raises(errors.InvalidRequest, match="api_key"):
        connect(base_url="http://127.0.0.1:1")
    with connect(base_url="http://127.0.0.1:1", api_key="mk_x") as client, pytest.raises(errors.Unavailable):
        client.models.list()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(errors.Unavailable, match="base_url"):
        connect(api_key="mk_x")


def test_streams_cut_short_and_foreign_pages_are_errors() -> None:
    with pytest.raises(errors.ReplicaLost):
        list(events(iter(['data: {"a":1}', ""])))
    assert list(events(iter([": keepalive", "", 'data: {"a":1}', "", "data: [DONE]"]))) == [{"a": 1}]
    for raw in (b"<html>", b"{}", b'{"error":null}', b'{"error":"text"}', b"\xff"):
        assert type(from_envelope(503, raw)) is errors.Overloaded
    assert type(from_envelope(418, b"")) is errors.InvalidRequest
    assert type(from_envelope(400, b'{"error":{"message":"m","code":"new_code"}}')) is errors.InvalidRequest
