"""Answers of models in all their forms, and refusals, against the published OpenAPI specification of the OpenAI API."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import pytest

from tests.deployments.gateway.conftest import Server
from tests.published import check

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "one two"}]}
TEXT = {"model": "echo", "prompt": ["one", "two three"]}


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "extra", [{}, {"service_tier": "flex"}, {"n": 3}, {"logprobs": True, "top_logprobs": 3}, {"max_tokens": 1}, {"stop": "two"}]
)
def test_chat_answers_conform(http: httpx.Client, extra: dict[str, object]) -> None:
    check("CreateChatCompletionResponse", http.post("/v1/chat/completions", json={**CHAT, **extra}).json())
    asked = {**CHAT, **extra, "stream": True, "stream_options": {"include_usage": True}}
    for event in events(http.post("/v1/chat/completions", json=asked)):
        if event["usage"] is None:
            del event["usage"]  # the clients' types allow this null, the document's schema of usage doesn't say so
        check("CreateChatCompletionStreamResponse", event)


@pytest.mark.parametrize("extra", [{}, {"n": 2}, {"logprobs": 3}, {"echo": True}])
def test_text_answers_conform(http: httpx.Client, extra: dict[str, object]) -> None:
    check("CreateCompletionResponse", http.post("/v1/completions", json={**TEXT, **extra}).json())
    for event in events(http.post("/v1/completions", json={**TEXT, **extra, "stream": True})):
        for choice in event["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"  # null on the wire of the real service, too
        check("CreateCompletionResponse", event)


def test_models_and_errors_conform(server: Server, http: httpx.Client) -> None:
    check("ListModelsResponse", http.get("/v1/models").json())
    check("Model", http.get("/v1/models/echo").json())
    for answer in (
        http.get("/v1/models/none"),
        http.get("/none"),
        http.delete("/v1/models"),
        http.post("/v1/completions", content=b"{"),
    ):
        check("ErrorResponse", answer.json())


def test_the_check_can_fail() -> None:
    with pytest.raises(jsonschema.ValidationError):
        check("ErrorResponse", {"error": {"message": "no param"}})
    with pytest.raises(jsonschema.ValidationError):
        check(
            "CreateChatCompletionStreamResponse",
            {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [{}]},
        )
