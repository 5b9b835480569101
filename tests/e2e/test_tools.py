"""Tools on the whole platform: a model with random weights on two shards that must call, and does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import openai
import pytest

from tests.deployments.engine import families
from tests.deployments.test_tools import ASK, SCHEMA, WEATHER
from tests.deployments.tools.chats import CHATS
from tests.e2e.platform import MODEL, RunningPlatform

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def caller(platform: RunningPlatform, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory: Path = families.build("llama", tmp_path_factory.mktemp("caller"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    (directory / "chat_template.jinja").write_text(CHATS["hermes"].template)
    platform.mmaas("deploy", "caller", "--model", str(directory), "--tp", "2")
    yield "caller"
    platform.mmaas("undeploy", "caller")


def test_a_required_call_round_trip_on_two_shards(platform: RunningPlatform, caller: str) -> None:
    with platform.client() as client:
        choice = {"type": "function", "function": {"name": "get_weather"}}
        with client.chat.completions.stream(
            model=caller, messages=ASK, tools=[WEATHER], tool_choice=choice, max_tokens=400, seed=3, n=2
        ) as stream:
            said = stream.get_final_completion()
        for one in said.choices:
            assert one.finish_reason == "tool_calls"
            (call,) = one.message.tool_calls
            jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
        result = {"role": "tool", "tool_call_id": call.id, "content": "It rains."}
        messages = [*ASK, said.choices[1].message.model_dump(include={"role", "tool_calls"}), result]
        answer = client.chat.completions.create(model=caller, messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=8)
        assert answer.choices[0].message.content


def test_a_model_without_tools_says_so(platform: RunningPlatform) -> None:
    with platform.client() as client, pytest.raises(openai.BadRequestError, match="can't call tools"):
        client.chat.completions.create(model=MODEL, messages=ASK, tools=[WEATHER])
