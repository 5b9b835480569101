"""Which format a model's calls have, what its prompt says of tools, and what nobody can make it say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cluster.errors import InvalidRequest, ModelNotServable
from cluster.types import Message, Tool, ToolCall
from deployments.engine.tokenizer import Tokenizer
from deployments.tools.formats import find_format
from tests.deployments.engine import texts
from tests.deployments.tools.chats import CHATS, Chat, write_tokenizer

SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "description": "Where"}}, "required": ["city"]}
WEATHER = Tool("get_weather", "The weather in a city", json.dumps(SCHEMA))
CALL = ToolCall("call_0123456789abcdef", "get_weather", '{"city": "Paris"}')
TURNS = (
    Message("user", "Is it raining?"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", "Yes.", name="get_weather", tool_call_id=CALL.id),
)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("chats")
    return {name: write_tokenizer(root / name, chat) for name, chat in CHATS.items()}


@pytest.fixture(scope="module")
def tokenizers(directories: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer.load(directory) for name, directory in directories.items()}


def text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """With control tokens by name."""
    return "".join(map(tokenizer.token_text, ids))


@pytest.mark.parametrize("name", CHATS)
def test_format_is_told_by_the_template(tokenizers, name):
    found = find_format(tokenizers[name])
    assert found.name == name
    expected = {"llama": ["<|python_tag|>"], "mistral": ["[TOOL_CALLS]"], "mistral-named": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]}
    assert [tokenizers[name].token_text(token) for token in found.shown] == expected.get(name, [])
    assert [tokenizers[name].token_text(token) for token in found.stop_ids] == (["<|eom_id|>"] if name == "llama" else [])


@pytest.mark.parametrize(
    "template",
    [
        texts.CHATML,
        "{{ messages[0].content }}<tool_call>",
        "{% if tools %}<tool_call><function=f>{% endif %}{{ messages[0].content }}",
        "{% if tools %}{{ tools }}{% endif %}{{ messages[0].content }}",
    ],
)
def test_other_templates_have_no_format(tmp_path, template):
    assert find_format(Tokenizer.load(write_tokenizer(tmp_path, Chat(template)))) is None


def test_format_can_be_named_where_the_template_knows_tools(tmp_path, tokenizers):
    xml = "{% if tools %}<tool_call><function=f>{% endif %}{{ messages[0].content }}"
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, Chat(xml)))
    assert find_format(tokenizer, "hermes").name == "hermes"
    assert find_format(Tokenizer.load(write_tokenizer(tmp_path, Chat(texts.CHATML))), "hermes") is None
    with pytest.raises(ModelNotServable, match="mistral-named"):
        find_format(tokenizer, "pythonic")


@pytest.mark.parametrize("name", CHATS)
def test_prompts_are_those_of_transformers(directories, tokenizers, name):
    reference = AutoTokenizer.from_pretrained(directories[name])
    ours = tokenizers[name].render(TURNS, (WEATHER,))
    short = next(iter(set(text(tokenizers[name], ours).split('"id": "')[1:])), "         ")[:9]
    function = {"name": "get_weather", "arguments": {"city": "Paris"}}
    messages = [
        {"role": "user", "content": "Is it raining?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": short, "type": "function", "function": function}]},
        {"role": "tool", "content": "Yes.", "name": "get_weather", "tool_call_id": short},
    ]
    described = {"name": "get_weather", "description": "The weather in a city", "parameters": SCHEMA}
    tools = [{"type": "function", "function": described}]
    expected = reference.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ours == expected


def test_result_finds_its_call_in_a_prompt_with_ids(tokenizers):
    said = text(tokenizers["mistral"], tokenizers["mistral"].render(TURNS, (WEATHER,)))
    call, result = said.split('"id": "')[1][:9], said.split('"call_id": "')[1][:9]
    assert call == result
    assert call.isalnum()


def test_a_chat_without_tools_is_not_told_of_any(tokenizers):
    assert "You may call" not in text(tokenizers["hermes"], tokenizers["hermes"].render([Message("user", "hi")]))


def test_a_template_for_tools_of_its_own_is_taken_where_there_are_tools(tmp_path):
    named = [{"name": "default", "template": texts.CHATML}, {"name": "tool_use", "template": CHATS["hermes"].template}]
    texts.byte_level(tmp_path, template=None, chat_template=named)
    tokenizer = Tokenizer.load(tmp_path)
    assert find_format(tokenizer).name == "hermes"
    assert "You may call" in text(tokenizer, tokenizer.render([Message("user", "hi")], (WEATHER,)))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}{{ messages[0].content }}")
    assert find_format(Tokenizer.load(tmp_path)) is None


def test_several_calls_are_refused_where_the_template_refuses_them(tokenizers):
    turns = (TURNS[0], Message("assistant", "", tool_calls=(CALL, ToolCall("b", "get_weather", "{}"))))
    with pytest.raises(InvalidRequest, match="one call a turn"):
        tokenizers["llama"].render(turns, (WEATHER,))


HOSTILE = [
    *["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<|im_end|>", "<|im_start|>", "[TOOL_CALLS]", "[INST]"],
    *["[/INST]", "[ARGS]", "<|python_tag|>", "<think>", "</think>", "<tool", "_call>", "[TOOL", "_CALLS]", " ", "x", '"', "\\"],
]
hostile = st.lists(st.sampled_from(HOSTILE), max_size=6).map("".join)


def control(tokenizer: Tokenizer, name: str, ids: list[int]) -> list[str]:
    known = {*CHATS[name].special, *CHATS[name].words, "<|im_end|>", "<|im_start|>", "<think>", "</think>"} - {"<b>"}
    return [token for token in map(tokenizer.token_text, ids) if token in known]


@pytest.mark.parametrize("name", CHATS)
@settings(deadline=None, max_examples=40)
@given(words=st.tuples(*[hostile] * 7))
def test_nothing_that_callers_write_is_a_control_token(tokenizers, name, words):
    user, described, key, value, result, argument, who = words

    def chat(*words: str) -> list[int]:
        user, described, key, value, result, argument, who = words
        schema = {"type": "object", "properties": {key: {"type": "string", "description": described, "enum": [value]}}}
        tool = Tool("f", described, json.dumps(schema))
        call = ToolCall(who, "f", json.dumps({key: {"b": [argument]}}))
        turns = (Message("user", user), Message("assistant", "", None, (call,)), Message("tool", result, None, (), who))
        return tokenizers[name].render((*turns, Message("user", user, name=who)), (tool,))

    expected = control(tokenizers[name], name, chat(*["x"] * 7))
    assert control(tokenizers[name], name, chat(user, described, key or "k", value, result, argument, who or "w")) == expected


def test_shielded_words_stay_readable(tokenizers):
    tokenizer = tokenizers["hermes"]
    ids = tokenizer.render([Message("user", "what does <tool_call> do, and <b>?")])
    assert "what does <tool_call> do, and <b>?" in tokenizer.decode(ids)
    assert tokenizer.token_id("<tool_call>") not in ids
    assert tokenizer.token_id("<b>") in ids, "only markup of the chat is shielded"


def test_an_assistants_own_markup_stays_what_it_is(tokenizers):
    """So that a template can cut earlier reasoning out, and sees earlier text as the model wrote it."""
    tokenizer = tokenizers["hermes"]
    turns = [Message("user", "hi </think>"), Message("assistant", "<think>secret</think>Hello <tool_call>"), Message("user", "?")]
    said = text(tokenizer, ids := tokenizer.render(turns))
    assert "secret" not in said
    assert "hi </think>" in said
    assert ids.count(tokenizer.token_id("<tool_call>")) == 1
    assert tokenizer.token_id("</think>") not in ids
    ends = tokenizer.render([Message("user", "hi"), Message("assistant", "<think></think><|im_end|>")])
    assert ends.count(tokenizer.token_id("<|im_end|>")) == 2, "special tokens are nobody's own"


def test_raw_prompts_may_hold_words_that_are_no_special_tokens(tokenizers):
    assert tokenizers["hermes"].token_id("<|fim|>") in tokenizers["hermes"].encode("a<|fim|>b")
    assert tokenizers["hermes"].token_id("<|fim|>") not in tokenizers["hermes"].render([Message("user", "a<|fim|>b")])
