"""What the grammars force and allow, judged by llguidance's matcher and by jsonschema; and that the parsers read all of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest

from cluster.errors import InvalidRequest
from cluster.types import Constraint, Tool, ToolCall, ToolChoice
from deployments.engine.detokenizer import Detokenizer
from deployments.engine.tokenizer import Tokenizer
from deployments.tools.formats import ToolFormat, find_format
from tests.deployments.tools.chats import CHATS, write_tokenizer
from tests.deployments.tools.matching import Grammars

PLACE = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Paris", "東京"]}},
}
ODD = {"type": "object", "properties": {"when": {"type": "string", "format": "no-such-format"}}, "required": ["when"]}
STRICT = Tool("get_weather", "The weather", json.dumps(PLACE), strict=True)
LOOSE = Tool("remind", None, json.dumps(ODD))
ANY = Tool("stop")
SCHEMAS = {"get_weather": PLACE, "remind": {"type": "object"}, "stop": {"type": "object"}}
RIGHT = '{"city": "Paris", "days": 3}'


@dataclass
class Model:
    tokenizer: Tokenizer
    format: ToolFormat
    grammars: Grammars

    def grammar(self, tools: tuple[Tool, ...], choice: ToolChoice, answer: Constraint | None = None) -> str:
        constraint = self.format.constraint(tools, choice, answer)
        assert constraint is not None
        assert constraint.kind == "grammar"
        return constraint.text

    def read(self, ids: list[int], tools: tuple[Tool, ...], choice: ToolChoice) -> tuple[str, list[ToolCall]]:
        """Text and calls of an answer, as a replica finds them."""
        stream = self.format.stream(tools, choice)
        detokenizer = Detokenizer(self.tokenizer, shown=self.format.shown)
        pieces = [stream.push(detokenizer.push([token]).text) for token in ids]
        pieces += [stream.push(detokenizer.finish().text), stream.finish(cut=False)]
        calls: dict[int, ToolCall] = {}
        for delta in [delta for piece in pieces for delta in piece.calls]:
            assert not delta.broken
            known = calls.get(delta.index) or ToolCall(delta.id or "", delta.name or "", "")
            calls[delta.index] = ToolCall(known.id, known.name, known.arguments + delta.arguments)
        return "".join(piece.text for piece in pieces), list(calls.values())

    def ids(self, *parts: str) -> list[int]:
        """Text as ids; a part that is a special token's name is that token."""
        special = self.tokenizer.special_ids
        ids = []
        for part in parts:
            known = self.tokenizer.token_id(part)
            ids += [known] if known is not None and known in special else self.tokenizer.encode(part)
        return ids


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    root: Path = tmp_path_factory.mktemp("models")
    found = {}
    for name, chat in CHATS.items():
        tokenizer = Tokenizer.load(write_tokenizer(root / name, chat))
        tool_format = find_format(tokenizer)
        assert tool_format is not None
        found[name] = Model(tokenizer, tool_format, Grammars(tokenizer))
    return found


def check(calls: list[ToolCall]) -> None:
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


ALL = (STRICT, LOOSE, ANY)
FORCED = [
    ToolChoice("required"),
    ToolChoice("required", parallel=False),
    ToolChoice("required", ("get_weather",), parallel=False),
    ToolChoice("required", ("get_weather", "stop")),
]


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("choice", FORCED, ids=["any", "one", "named", "some"])
def test_whatever_is_forced_is_read_and_validates(models, name, choice):
    model = models[name]
    grammar = model.grammar(ALL, choice)
    seen = set()
    for seed in range(4):
        ids = model.grammars.sample(grammar, seed)
        text, calls = model.read(ids, ALL, choice)
        assert text == ""
        assert len(calls) >= 1
        assert choice.parallel or len(calls) == 1
        check(calls)
        seen |= {call.name for call in calls}
    assert seen <= set(choice.names or SCHEMAS)


@pytest.mark.parametrize("name", CHATS)
def test_nothing_but_a_call_is_possible_where_one_is_required(models, name):
    model = models[name]
    grammar = model.grammar(ALL, ToolChoice("required"))
    assert not model.grammars.takes(grammar, [])
    for text in (
        "Hello",
        "[TOOL",
        "<tool_call>\nHello",
        '{"name": "other"',
        '{"name": "get_weather", "parameters": {"city": "Rome',
    ):
        assert not model.grammars.begins(grammar, model.ids(text))


CALLS = {
    "hermes": ('<tool_call>\n{"name": "get_weather", "arguments": ', "}\n</tool_call>"),
    "llama": ('{"name": "get_weather", "parameters": ', "}"),
    "mistral": ("[TOOL_CALLS]", '[{"name": "get_weather", "arguments": ', "}]"),
    "mistral-named": ("[TOOL_CALLS]", "get_weather", "[ARGS]", ""),
}


@pytest.mark.parametrize("name", CHATS)
def test_a_free_answer_is_text_or_calls_that_validate(models, name):
    model = models[name]
    grammar = model.grammar((STRICT, LOOSE), ToolChoice("auto"))
    *head, tail = CALLS[name]
    assert model.grammars.takes(grammar, model.ids("It rains: {no} <tool [TOOL"))
    assert model.grammars.takes(grammar, [])
    assert model.grammars.takes(grammar, model.ids(*head, RIGHT, tail))
    assert not model.grammars.begins(grammar, model.ids(*head, '{"city": "Rome"'))
    assert not model.grammars.begins(grammar, model.ids(*head, '{"days"'))
    loose = model.ids(*[part.replace("get_weather", "remind") for part in head], '{"when": "now"}', tail)
    assert model.grammars.takes(grammar, loose)
    if name != "llama":
        assert model.grammars.takes(grammar, model.ids("First I look.\n", *head, RIGHT, tail))
        assert not model.grammars.begins(grammar, model.ids("First I look.\n", *head, '{"city": "Rome"'))
    ids = model.ids(*head)
    for seed in range(3):
        sampled = model.grammars.sample(grammar, seed, after=ids, most=len(ids) + 120)
        _, calls = model.read(sampled, (STRICT, LOOSE), ToolChoice("auto"))
        check(calls)
        assert calls


@pytest.mark.parametrize("name", CHATS)
def test_several_calls_only_where_they_are_wanted(models, name):
    model = models[name]
    *head, tail = CALLS[name]
    one = model.ids(*head, RIGHT, tail)
    between = {"hermes": "\n", "mistral-named": ""}.get(name)
    two = [*one, *(model.ids(between) if between else []), *one]
    if name == "mistral":
        call = f'{{"name": "get_weather", "arguments": {RIGHT}}}'
        two = model.ids("[TOOL_CALLS]", f"[{call}, {call}]")
    for mode in ("required", "auto"):
        assert model.grammars.takes(model.grammar((STRICT,), ToolChoice(mode)), two) == (name != "llama")
        assert not model.grammars.takes(model.grammar((STRICT,), ToolChoice(mode, parallel=False)), two)
        assert model.grammars.takes(model.grammar((STRICT,), ToolChoice(mode, parallel=False)), one)


@pytest.mark.parametrize("name", CHATS)
def test_an_answer_of_a_form_stands_beside_calls(models, name):
    model = models[name]
    form = Constraint("json_schema", json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}))
    grammar = model.grammar((STRICT,), ToolChoice("auto"), form)
    *head, tail = CALLS[name]
    head = ["<|python_tag|>", *head] if name == "llama" else head
    assert model.grammars.takes(grammar, model.ids('{"a": 7}'))
    assert model.grammars.takes(grammar, model.ids(*head, RIGHT, tail))
    assert not model.grammars.begins(grammar, model.ids("Hello"))
    assert not model.grammars.begins(grammar, model.ids(*head, '{"city": "Rome"'))
    assert model.grammar((STRICT,), ToolChoice("required"), form) == model.grammar((STRICT,), ToolChoice("required"))


def test_no_grammar_where_a_parser_is_enough(models):
    model = models["hermes"]
    assert model.format.constraint((LOOSE, ANY), ToolChoice("auto"), None) is None
    assert model.format.constraint((LOOSE, ANY), ToolChoice("auto", ("stop",)), None) is not None
    with pytest.raises(InvalidRequest, match="beside tools"):
        model.format.constraint((LOOSE,), ToolChoice("auto"), Constraint("regex", "a*"))


def test_names_and_schemas_are_only_text_in_a_grammar(models):
    """Nothing that a caller writes adds a rule."""
    hostile = {"type": "object", "properties": {'a"\nstart: "x"': {"const": '}\nTEXT: /x/ "'}}, "required": ['a"\nstart: "x"']}
    tool = Tool("f", None, json.dumps(hostile), strict=True)
    model = models["hermes"]
    sampled = model.grammars.sample(model.grammar((tool,), ToolChoice("required", parallel=False)), 1)
    _, (call,) = model.read(sampled, (tool,), ToolChoice("required"))
    jsonschema.validate(json.loads(call.arguments), hostile)
