"""A model that fails on a choice, sleeps or wakes, as callers and administrators see it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import openai
import pytest

from cluster.types import Delta, Sampling
from deployments.answer import Answer
from deployments.engine.messages import Output
from deployments.engine.sampler import NO_TOKEN
from tests.deployments.engine.arithmetic import request as asked
from tests.deployments.gateway.conftest import Server
from tests.fakes import KeyRing

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def body(**more: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": "one two three"}], **more}


def parts(answer: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_failure_before_any_token_is_an_error_answer(server: Server, http: httpx.Client, path: str, stream: bool) -> None:
    server.models.fails = {0: 0}
    given = body(stream=stream) if path == CHAT else {"model": "echo", "prompt": "one two three", "stream": stream}
    answer = http.post(path, json=given)
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("model_error", "server_error", None)
    assert "no token can be chosen" in error["message"]
    assert answer.headers["x-should-retry"] == "false", "it would fail again"


def test_failure_in_a_stream_comes_after_everything_that_was_said(server: Server, http: httpx.Client) -> None:
    server.models.fails = {0: 2}
    *said, error = parts(http.post(CHAT, json=body(stream=True)))
    assert [part["choices"][0]["delta"].get("content") for part in said] == ["", "one", " two"]
    assert [part["choices"][0]["finish_reason"] for part in said] == [None] * 3
    assert error["error"]["code"] == "model_error"


@pytest.mark.parametrize("at", [0, 2])
def test_failure_of_one_choice_leaves_the_others_whole(server: Server, http: httpx.Client, at: int) -> None:
    server.models.fails = {1: at}
    answer = http.post(CHAT, json=body(n=3))
    assert answer.status_code == 200
    found = {choice["index"]: (choice["message"]["content"], choice["finish_reason"]) for choice in answer.json()["choices"]}
    assert found == {0: ("one two three", "stop"), 2: ("one two three", "stop")}
    assert answer.json()["usage"]["total_tokens"] > 0
    *said, error = parts(http.post(CHAT, json=body(n=3, stream=True)))
    texts = {
        index: "".join(p["choices"][0]["delta"].get("content", "") for p in said if p["choices"][0]["index"] == index)
        for index in range(3)
    }
    assert texts == {0: "one two three", 1: "one two three"[: {0: 0, 2: 7}[at]], 2: "one two three"}
    ends = {part["choices"][0]["index"] for part in said if part["choices"][0]["finish_reason"]}
    assert ends == {0, 2}
    assert "choice 1" in error["error"]["message"]


def test_official_client_sees_the_failure(server: Server) -> None:
    server.models.fails = {0: 1}
    with server.client() as client:
        with pytest.raises(openai.InternalServerError) as whole:
            client.chat.completions.create(**body())
        assert whole.value.code == "model_error"
        with pytest.raises(openai.APIError) as late:
            list(client.chat.completions.create(**body(stream=True)))
        assert late.value.code == "model_error"


def test_administrators_alone_put_a_model_to_sleep(server: Server, http: httpx.Client) -> None:
    assert http.post("/v1/models/echo/sleep").status_code == 403
    with server.http(KeyRing.ADMIN) as admin:
        assert admin.post("/v1/models/echo/sleep").status_code == 204
        assert admin.get("/ready").json() == {"ready": True, "models": {"echo": True}, "asleep": ["echo"]}
        assert admin.post("/v1/models/nobody/sleep").json()["error"]["code"] == "model_not_found"
        assert admin.post("/v1/models/echo/wake").status_code == 204
        assert admin.get("/ready").json()["asleep"] == []


class Letters:
    """Token t is a letter."""

    special_ids: frozenset[int] = frozenset()

    def token_bytes(self, token: int) -> bytes:
        return bytes([97 + token])

    opening_bytes = token_bytes


def test_answer_keeps_its_text_and_counts_what_was_said() -> None:
    request = msgspec.structs.replace(asked(1, [5, 6]), sampling=Sampling(stop=("bxyz",)))
    answer = Answer(Letters(), request, is_chat=True, stop_choice=lambda _: None)  # type: ignore[arg-type]
    said = answer.take([Output(1, 0, 0, cached=1), Output(1, 0, 1)])
    assert said.deltas == (Delta(0, "a", (0, 1)),), "b may be the start of a stop string"
    end = answer.take([Output(1, 0, NO_TOKEN, finish_reason="error")])
    assert end.deltas == (Delta(0, "b", (), (), "error"),)
    assert end.usage is not None
    assert (end.usage.completion_tokens, end.usage.cached_tokens) == (2, 1)
