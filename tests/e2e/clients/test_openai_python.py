"""OpenAI's Python client, strict about every answer, through structured output, tools, log probabilities and encoders."""

from __future__ import annotations

from typing import Any, Literal

import httpx
import numpy as np
import openai
import pydantic
import pytest

from tests.e2e.clients.conftest import Served

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ASK: list[Any] = [{"role": "user", "content": "Is it raining?"}]


class Weather(pydantic.BaseModel):
    """Of a city, on a day."""

    model_config = pydantic.ConfigDict(extra="forbid")

    city: str
    days: int = pydantic.Field(ge=1, le=99)
    unit: Literal["celsius", "fahrenheit"]
    notes: list[str] | None


class Stop(pydantic.BaseModel):
    """Ends everything."""

    model_config = pydantic.ConfigDict(extra="forbid")


TOOLS: list[Any] = [openai.pydantic_function_tool(Weather, name="get_weather"), openai.pydantic_function_tool(Stop, name="stop")]


@pytest.fixture
def client(served: Served) -> Any:
    with served.platform.client() as client:
        yield client


@pytest.fixture
def options(served: Served) -> dict[str, Any]:
    return {"model": "caller", "messages": ASK, "logit_bias": served.taste, "seed": 7, "max_tokens": 600}


def test_an_answer_parses_whole_and_streamed(client: openai.OpenAI, options: dict[str, Any]) -> None:
    options["response_format"] = Weather
    whole = client.chat.completions.parse(**options).choices[0]
    assert isinstance(whole.message.parsed, Weather)
    with client.chat.completions.stream(**options) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    assert (final.message.parsed, final.message.content) == (whole.message.parsed, whole.message.content)
    assert "".join(event.delta for event in events if event.type == "content.delta") == final.message.content
    assert [event.parsed for event in events if event.type == "content.done"] == [final.message.parsed]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_every_choice_has_calls_whose_arguments_parse(client: openai.OpenAI, options: dict[str, Any], choice: Any) -> None:
    options |= {"tools": TOOLS, "tool_choice": choice, "n": 3}
    whole = client.chat.completions.parse(**options)
    with client.chat.completions.stream(**options) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()
    for answer in (whole, final):
        assert [one.finish_reason for one in answer.choices] == ["tool_calls"] * 3
        calls = [call.function for one in answer.choices for call in one.message.tool_calls or []]
        assert len(calls) >= 3
        assert all(isinstance(call.parsed_arguments, {"get_weather": Weather, "stop": Stop}[call.name]) for call in calls)
        if choice != "required":
            assert {call.name for call in calls} == {"get_weather"}
    said = [[[call.function.arguments for call in one.message.tool_calls] for one in answer.choices] for answer in (whole, final)]
    assert said[0] == said[1], "one seed says the same, streamed or not"
    assert sorted(event.arguments for event in done) == sorted(argument for one in said[1] for argument in one)


def test_a_call_and_its_result_go_back_as_the_client_holds_them(client: openai.OpenAI, options: dict[str, Any]) -> None:
    options |= {"tools": TOOLS, "parallel_tool_calls": False}
    said = client.chat.completions.parse(**options, tool_choice="required").choices[0].message
    (call,) = said.tool_calls or []
    options["messages"] = [*ASK, said, {"role": "tool", "tool_call_id": call.id, "content": "It rains."}]
    answer = client.chat.completions.create(**options | {"max_tokens": 8}, tool_choice="none").choices[0]
    assert answer.message.content
    assert answer.message.tool_calls is None


def test_log_probabilities_go_with_a_form(client: openai.OpenAI, options: dict[str, Any]) -> None:
    options |= {"response_format": Weather, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.parse(**options).choices[0]
    with client.chat.completions.stream(**options) as stream:
        final = stream.get_final_completion().choices[0]
    for one in (whole, final):
        assert one.logprobs is not None
        tokens = one.logprobs.content or []
        assert b"".join(bytes(token.bytes or []) for token in tokens).decode().removesuffix("<|end|>") == one.message.content
        assert all(np.isfinite(token.logprob) and len(token.top_logprobs) == 2 for token in tokens)


def test_a_cut_answer_is_said_to_be_cut(client: openai.OpenAI, options: dict[str, Any]) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**options | {"max_tokens": 3}, response_format=Weather)


def test_embeddings_are_the_same_as_numbers_and_as_base64(client: openai.OpenAI, served: Served) -> None:
    texts = ["the quick brown fox", "red blue"]
    numbers = client.embeddings.create(model="embedder", input=texts, encoding_format="float")
    lenient = openai.OpenAI(
        base_url=served.base_url, api_key=served.api_key, max_retries=0
    )  # the strict one checks before it unpacks
    packed = lenient.embeddings.create(model="embedder", input=texts)  # the client asks for base64
    assert [item.index for item in numbers.data] == [0, 1]
    np.testing.assert_array_equal(
        np.array([item.embedding for item in numbers.data], np.float32),
        np.array([item.embedding for item in packed.data], np.float32),
    )


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert {"caller", "embedder", "judge"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("caller").id == "caller"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("absent")


def test_ranking_and_classes_over_plain_http(served: Served) -> None:
    with httpx.Client(base_url=served.base_url, headers={"Authorization": f"Bearer {served.api_key}"}, trust_env=False) as http:
        documents = ["lazy dog", "red blue green", "red cat"]
        ranked = http.post("/rerank", json={"model": "embedder", "query": "red blue green", "documents": documents, "top_n": 2})
        assert ranked.status_code == 200, ranked.text
        results = ranked.json()["results"]
        assert results[0]["index"] == 1
        assert len(results) == 2
        assert results[0]["relevance_score"] >= results[1]["relevance_score"]
        judged = http.post("/classify", json={"model": "judge", "input": documents})
        assert judged.status_code == 200, judged.text
        for number, item in enumerate(judged.json()["data"]):
            assert item["index"] == number
            assert item["label"] == f"label {int(np.argmax(item['probs']))}"
            assert sum(item["probs"]) == pytest.approx(1, abs=1e-4)
