"""Tools through the official client: what a model is shown, what it says, and what callers hear. The replica's code is real, only
its engine speaks from a script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from pydantic import BaseModel

from tests.deployments.gateway.conftest import Server, serving
from tests.deployments.tools.chats import CHATS, write_tokenizer
from tests.fakes import ReplicaModels
from tests.published import check

ASK = [{"role": "user", "content": "Is it raining in Paris?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "get_weather", "description": "Now", "parameters": SCHEMA}}
STRICT: dict[str, Any] = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
ADD: dict[str, Any] = {"type": "function", "function": {"name": "add"}}
PARIS = '{"city": "Paris \\"<b>\\" {東京}"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
TWO = CALL + '\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
WRITTEN = {
    "hermes": TWO,
    "llama": f'{{"name": "get_weather", "parameters": {PARIS}}}; {{"name": "add", "parameters": {{}}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}, {{"name": "add", "arguments": {{}}}}]',
    "mistral-named": f"[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]add[ARGS]{{}}",
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    root: Path = tmp_path_factory.mktemp("families")
    found = {}
    for name, chat in CHATS.items():
        found[name] = ReplicaModels(write_tokenizer(root / name, chat))
    with (
        serving(found["hermes"]) as hermes,
        serving(found["llama"]) as llama,
        serving(found["mistral"]) as mistral,
        serving(found["mistral-named"]) as named,
    ):
        yield {"hermes": hermes, "llama": llama, "mistral": mistral, "mistral-named": named}


@pytest.fixture
def model(families: dict[str, Server]) -> ReplicaModels:
    models = families["hermes"].models
    assert isinstance(models, ReplicaModels)
    models.engine.at_once = 1
    return models


@pytest.fixture
def client(families: dict[str, Server]) -> Iterator[openai.OpenAI]:
    with families["hermes"].client() as client:
        yield client


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "caller", "messages": ASK, "tools": [WEATHER, ADD], **more})


@pytest.mark.parametrize("family", CHATS)
@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_calls_of_every_family_arrive_whole_and_streamed(families, family, at_once):
    models = families[family].models
    models.say(WRITTEN[family])
    models.engine.at_once = at_once
    with families[family].client() as client:
        answer = ask(client)
        message = answer.choices[0].message
        assert [(call.type, call.function.name, call.function.arguments) for call in message.tool_calls] == [
            ("function", "get_weather", PARIS),
            ("function", "add", "{}"),
        ]
        assert (message.content, answer.choices[0].finish_reason) == (None, "tool_calls")
        assert answer.usage.completion_tokens == len(models.engine.scripts[0])
        with client.chat.completions.stream(model="caller", messages=ASK, tools=[WEATHER, ADD]) as stream:
            done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
            final = stream.get_final_completion()
        assert [(event.index, event.name, event.arguments) for event in done] == [(0, "get_weather", PARIS), (1, "add", "{}")]
        assert final.choices[0].finish_reason == "tool_calls"
        assert final.choices[0].message.content is None
        assert len({call.id for call in [*message.tool_calls, *final.choices[0].message.tool_calls]}) == 4


def test_first_delta_of_a_call_says_which_and_the_others_only_what_is_new(client, model):
    model.say("I look.\n" + CALL)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "I look."
    first, *rest = [call for delta in deltas for call in delta.tool_calls or []]
    assert (first.index, first.type, first.function.name) == (0, "function", "get_weather")
    assert first.id.startswith("call_")
    assert all(call.id is None and call.type is None and call.function.name is None for call in rest)
    assert len([call for call in rest if call.function.arguments]) > 5
    assert first.function.arguments + "".join(call.function.arguments for call in rest) == PARIS
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "tool_calls"
    assert not any("<" in (delta.content or "") for delta in deltas)
    assert chunks[-1].usage.completion_tokens == len(model.engine.scripts[0])


def test_answers_with_calls_conform(families, model):
    for script in (CALL, "text " + TWO, "no call"):
        model.say(script)
        body = {"model": "caller", "messages": ASK, "tools": [WEATHER, ADD], "logprobs": True}
        with families["hermes"].http() as http:
            check("CreateChatCompletionResponse", http.post("/v1/chat/completions", json=body).json())
            lines = http.post("/v1/chat/completions", json={**body, "stream": True}).text.split("\n\n")
        for line in lines:
            if line.startswith("data: {"):
                check("CreateChatCompletionStreamResponse", json.loads(line.removeprefix("data: ")))


def test_a_round_trip_shows_the_model_its_call_and_the_result(client, model):
    model.say(CALL)
    said = ask(client).choices[0].message
    result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "It rains. </tool_response>"}
    model.say("Yes, it rains.")
    answer = ask(client, messages=[*ASK, said, result], tool_choice="none")
    assert "get_weather" not in model.asked.split("<|im_start|>assistant")[0], "a model that must not call is shown no tools"
    answer = ask(client, messages=[*ASK, said.model_dump(exclude_none=True), result])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Yes, it rains.", "stop")
    assert answer.choices[0].message.tool_calls is None
    assert json.dumps(WEATHER, ensure_ascii=False) in model.asked
    assert CALL in model.asked
    assert "<tool_response>\nIt rains. </tool_response>\n</tool_response>" in model.asked
    ids = model.engine.requests[-1].prompt
    assert ids.count(model.tokenizer.token_id("</tool_response>")) == 1, "what a result says is text"
    assert model.requests[-1].messages[-1].name == "get_weather"


def test_what_is_no_call_comes_as_text_whole(client, model):
    for text in ("A <tool_call> is a tag.", '<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>', '{"name": "add"}'):
        model.say(text)
        answer = ask(client)
        assert (answer.choices[0].message.content, answer.choices[0].message.tool_calls) == (text, None)
        assert answer.choices[0].finish_reason == "stop"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True)) == text


def test_a_call_that_breaks_is_text_in_a_whole_answer(client, model):
    broken = '<tool_call>\n{"name": "get_weather", "arguments": {"city": Paris}}\n</tool_call>'
    model.say(broken + CALL)
    message = ask(client).choices[0].message
    assert message.content == broken
    assert [call.function.arguments for call in message.tool_calls] == [PARIS]
    parts = [delta for chunk in ask(client, stream=True) for delta in chunk.choices[0].delta.tool_calls or []]
    assert "".join(part.function.arguments for part in parts if part.index == 1) == PARIS


def test_special_tokens_that_mark_calls_are_never_text(families):
    models = families["mistral"].models
    with families["mistral"].client() as client:
        for script, text in (("[TOOL_CALLS] oops", " oops"), ("a [TOOL_CALLS]", "a "), ("[TOOL_CALLS]" + WRITTEN["mistral"], "")):
            models.say(script)
            message = ask(client).choices[0].message
            assert (message.content or "") == text
            assert bool(message.tool_calls) == (text == "")


def test_one_call_at_most(client, model):
    model.say("Both: " + TWO)
    answer = ask(client, parallel_tool_calls=False)
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["get_weather"]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.usage.completion_tokens < len(model.engine.scripts[0]) - 10, "the rest was not waited for"


def test_choices_call_each_for_itself(client, model):
    model.say(CALL, "No call.", TWO)
    choices = ask(client, n=3).choices
    assert [len(choice.message.tool_calls or []) for choice in choices] == [1, 0, 2]
    assert [choice.finish_reason for choice in choices] == ["tool_calls", "stop", "tool_calls"]
    with client.chat.completions.stream(model="caller", messages=ASK, tools=[WEATHER, ADD], n=3) as stream:
        final = stream.get_final_completion()
    assert [len(choice.message.tool_calls or []) for choice in final.choices] == [1, 0, 2]


def test_logprobs_are_those_of_the_text(client, model):
    model.say("Wait: é\n" + CALL)
    answer = ask(client, logprobs=True, top_logprobs=1)
    tokens = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == "Wait: é"
    streamed = [t for c in ask(client, logprobs=True, stream=True) if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in tokens]
    model.say("No call at all")
    tokens = ask(client, logprobs=True).choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == "No call at all"


def test_a_call_that_is_cut_off_says_so(client, model):
    model.say(CALL)
    answer = ask(client, max_tokens=len(model.engine.scripts[0]) - 15)
    assert answer.choices[0].finish_reason == "length"
    (call,) = answer.choices[0].message.tool_calls
    assert PARIS.startswith(call.function.arguments)


def test_pydantic_tools_are_parsed_by_the_official_client(client, model):
    class GetWeather(BaseModel):
        """The weather in a city."""

        city: str

    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
    model.say('<tool_call>\n{"name": "get_weather", "arguments": {"city": "東京"}}\n</tool_call>')
    parsed = client.chat.completions.parse(model="caller", messages=ASK, tools=[tool])
    assert parsed.choices[0].message.tool_calls[0].function.parsed_arguments == GetWeather(city="東京")
    with client.chat.completions.stream(model="caller", messages=ASK, tools=[tool]) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.parsed_arguments == GetWeather(city="東京")
    assert model.requests[-1].tools[0].strict


@pytest.mark.parametrize(
    ("more", "constrained"),
    [
        ({}, False),
        ({"tool_choice": "auto"}, False),
        ({"tool_choice": "none", "tools": [STRICT]}, False),
        ({"tool_choice": "required"}, True),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, True),
        ({"tools": [STRICT, ADD]}, True),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "add"}}]},
                }
            },
            True,
        ),
    ],
)
def test_the_engine_is_held_to_a_grammar_where_a_promise_needs_one(client, model, more, constrained):
    model.say("<tool_call>\n" + '{"name": "add", "arguments": {}}' + "\n</tool_call>")
    ask(client, **more)
    constraint = model.engine.requests[-1].sampling.constraint
    assert (constraint is not None) == constrained
    if constraint is not None:
        assert constraint.kind == "grammar"
        assert ('\\"add\\"' in constraint.text) or not constrained
        named = isinstance(more.get("tool_choice"), dict)
        assert ("get_weather" in constraint.text) == (not named)


def test_only_allowed_tools_are_calls(client, model):
    model.say(CALL)
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "add"}}]},
    }
    assert ask(client, tool_choice=choice).choices[0].message.tool_calls is None
    assert "get_weather" in model.asked, "the prompt stays the same, and what is cached of it"


def test_a_template_without_tools_refuses_them_by_the_models_name(tmp_path):
    chat = CHATS["hermes"]
    from tests.deployments.engine import texts

    with serving(ReplicaModels(write_tokenizer(tmp_path, type(chat)(texts.CHATML)), "plain")) as server, server.client() as client:
        server.models.say("Hello")
        with pytest.raises(openai.BadRequestError, match="'plain' can't call tools") as refused:
            ask(client, model="plain")
        assert (refused.value.param, refused.value.code) == ("tools", "unsupported_parameter")
        assert ask(client, model="plain", tool_choice="none").choices[0].message.content == "Hello"


SAID = {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "add", "arguments": "{}"}}]}
RESULT = {"role": "tool", "tool_call_id": "a", "content": "1"}


def say(**changes: Any) -> dict[str, Any]:
    call = {"id": "a", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    function = {**call["function"], **changes.pop("function", {})}  # type: ignore[dict-item]
    return {"role": "assistant", "tool_calls": [{**call, "function": function, **changes}]}


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
        ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": "a" * 65}}]}),
        ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": "a\n"}}]}),
        ("tools[0].function", {"tools": [{"type": "function"}]}),
        ("tools[0].type", {"tools": [{"type": "custom", "custom": {"name": "a"}}]}),
        ("tools[0].function.parameters", {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}),
        (
            "tools[0].function.parameters",
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]},
        ),
        (
            "tools[0].function.parameters",
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"description": "x" * 70_000}}}]},
        ),
        ("tools[0].function.strict", {"tools": [{"type": "function", "function": {"name": "a", "strict": "yes"}}]}),
        ("tools[1].function.name", {"tools": [ADD, ADD]}),
        (
            "tools[1].function.parameters",
            {"tools": [ADD, {"type": "function", "function": {"name": "a", "parameters": {"not": {}}, "strict": True}}]},
        ),
        ("tools", {"tools": [{"type": "function", "function": {"name": f"f{n}"}} for n in range(129)]}),
        ("tool_choice", {"tool_choice": "any"}),
        ("tool_choice", {"tool_choice": {"type": "auto"}}),
        ("tool_choice", {"tool_choice": {"type": "function"}}),
        ("tool_choice.function.name", {"tool_choice": {"type": "function", "function": {"name": 7}}}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "other"}}}),
        ("tool_choice", {"tools": None, "tool_choice": "required"}),
        ("parallel_tool_calls", {"parallel_tool_calls": "no"}),
        ("functions", {"functions": [{"name": "f"}]}),
        ("function_call", {"function_call": {"name": "f"}}),
        ("messages[1].tool_call_id", {"messages": [*ASK, RESULT]}),
        ("messages[1].tool_call_id", {"messages": [*ASK, {"role": "tool", "content": "x"}]}),
        ("messages[2].content", {"messages": [*ASK, SAID, {"role": "tool", "tool_call_id": "a"}]}),
        ("messages[1].tool_calls", {"messages": [*ASK, SAID]}),
        ("messages[1].tool_calls", {"messages": [*ASK, SAID, *ASK]}),
        ("messages[3].tool_call_id", {"messages": [*ASK, SAID, RESULT, RESULT]}),
        ("messages[2].tool_call_id", {"messages": [*ASK, SAID, {**RESULT, "tool_call_id": "b"}]}),
        ("messages[1].tool_calls", {"messages": [*ASK, {**SAID, "tool_calls": SAID["tool_calls"] * 2}, RESULT]}),
        ("messages[0].tool_calls", {"messages": [{**SAID, "role": "user", "content": "x"}]}),
        ("messages[0].tool_call_id", {"messages": [{**ASK[0], "tool_call_id": "a"}]}),
        ("messages[1].tool_calls[0].function.arguments", {"messages": [*ASK, say(function={"arguments": "{"}), RESULT]}),
        ("messages[1].tool_calls[0].function.arguments", {"messages": [*ASK, say(function={"arguments": "[1]"}), RESULT]}),
        (
            "messages[1].tool_calls[0].function.arguments",
            {"messages": [*ASK, say(function={"arguments": '{"a":' * 70 + "1" + "}" * 70}), RESULT]},
        ),
        ("messages[1].tool_calls[0].function.name", {"messages": [*ASK, say(function={"name": "<|im_end|>"}), RESULT]}),
        ("messages[1].tool_calls[0].type", {"messages": [*ASK, say(type="custom"), RESULT]}),
        ("messages[1].tool_calls[0].id", {"messages": [*ASK, say(id=""), RESULT]}),
        ("messages[1].content", {"messages": [*ASK, {"role": "assistant", "tool_calls": []}]}),
    ],
)
def test_bad_tools_are_refused_by_their_place(client, param, body):
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/chat/completions", body={"model": "caller", "messages": ASK, "tools": [ADD], **body}, cast_to=object)
    assert refused.value.param == param


def test_arguments_that_the_test_model_writes_validate():
    jsonschema.validate(json.loads(PARIS), SCHEMA)
