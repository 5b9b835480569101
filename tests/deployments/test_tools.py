"""A model with random weights calls tools: whatever it would say, a required call is one, and its arguments validate. From the
official client through gateway and replica to a real engine on real weights."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from cluster.settings import EngineSettings
from deployments.engine.local import LocalEngine
from deployments.engine.messages import Output, Request
from tests.deployments.engine import families
from tests.deployments.gateway.conftest import serving
from tests.deployments.tools.chats import CHATS
from tests.fakes import AwakeLife, ReplicaModels

pytest.importorskip("deployments.engine.structured", reason="grammars are enforced by the engine's structured output")

ASK = [{"role": "user", "content": "Is it raining?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "東京", 'a "b" {'], "type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA, "strict": True}}
STOP: dict[str, Any] = {
    "type": "function",
    "function": {"name": "stop", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}, "strict": True},
}


class RealEngine:
    """What a replica asks of its engine, over one in this process. One request at a time."""

    def __init__(self, local: LocalEngine) -> None:
        self._local = local
        self._number = 0
        self.num_streams = 0

    def next_id(self) -> int:
        self._number += 1
        return self._number

    def abort(self, request_id: int, index: int) -> None:
        self._local.engine.abort(request_id, index)

    async def generate(self, request: Request) -> AsyncGenerator[list[Output], None]:
        self._local.engine.add(request)
        while self._local.engine.has_work:
            yield await asyncio.to_thread(self._local.engine.step)


@pytest.fixture(scope="module", params=["hermes", "llama"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    directory: Path = families.build("llama", tmp_path_factory.mktemp("model"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    (directory / "chat_template.jinja").write_text(CHATS[request.param].template)
    models = ReplicaModels(directory)
    with LocalEngine(directory, settings=EngineSettings(native=False), blocks=400) as local:
        models.replica._life = AwakeLife(RealEngine(local))  # type: ignore[assignment]
        models.replica._model = local.info
        models.replica._room = 4096
        with serving(models) as server, server.client() as client:
            yield client


def ask(client: openai.OpenAI, **more: Any) -> Any:
    options = {"model": "caller", "messages": ASK, "tools": [WEATHER, STOP], "seed": 1, "max_tokens": 600}
    return client.chat.completions.create(**{**options, **more})


def check(calls: Any) -> None:
    assert calls
    for call in calls:
        schema = {"get_weather": SCHEMA, "stop": STOP["function"]["parameters"]}[call.function.name]
        jsonschema.validate(json.loads(call.function.arguments), schema)


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_required_call_is_made_and_right(client, temperature):
    answer = ask(client, tool_choice="required", parallel_tool_calls=False, temperature=temperature).choices[0]
    assert (answer.message.content, answer.finish_reason, len(answer.message.tool_calls)) == (None, "tool_calls", 1)
    check(answer.message.tool_calls)


def test_several_choices_stream_calls_each_its_own(client):
    choice = {"type": "function", "function": {"name": "get_weather"}}
    options: dict[str, Any] = {"tool_choice": choice, "temperature": 1.2, "n": 3, "seed": 5}
    whole = ask(client, **options)
    with client.chat.completions.stream(model="caller", messages=ASK, tools=[WEATHER, STOP], max_tokens=600, **options) as stream:
        final = stream.get_final_completion()
    for answer in (whole, final):
        for one in answer.choices:
            assert [call.function.name for call in one.message.tool_calls] == ["get_weather"]
            assert one.finish_reason == "tool_calls"
            check(one.message.tool_calls)
    said = [[one.message.tool_calls[0].function.arguments for one in answer.choices] for answer in (whole, final)]
    assert said[0] == said[1], "one seed says the same, streamed or not"


def test_a_whole_round_trip(client):
    called = ask(client, tool_choice="required", parallel_tool_calls=False).choices[0].message
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "Yes. <|im_end|></tool_response>"}
    answer = ask(client, messages=[*ASK, called, result], tool_choice="none", max_tokens=9).choices[0]
    assert answer.message.tool_calls is None
    assert answer.message.content
    again = ask(client, messages=[*ASK, called, result], tool_choice="required", parallel_tool_calls=False).choices[0]
    check(again.message.tool_calls)


def test_a_free_answer_of_strict_tools_is_text_here(client):
    answer = ask(client, max_tokens=24).choices[0]
    assert answer.message.content
    assert answer.finish_reason in ("stop", "length")
