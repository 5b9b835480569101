"""Forms that the soak's answers are held to, old ones and new ones, and whether an answer has its form: by jsonschema and `re`."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from typing import Any, Literal

from cluster.types import Constraint, Tool, ToolChoice
from deployments.engine import schemas
from deployments.tools.formats import ToolFormat
from deployments.tools.hermes import Hermes
from deployments.tools.marks import Mark

HERMES = ToolFormat("hermes", Hermes(Mark("<tool_call>"), Mark("</tool_call>")), {})
"""As it is found for a template like Qwen's."""
ONE_CALL = ToolChoice("required", parallel=False)
FRESH = 0.3
"""Share of forms that nobody has asked for before, so that compiled ones are forgotten all the time."""


@dataclass(frozen=True)
class Form:
    """`wanted`: a JSON schema, or for a `text` an expression. `tools`: of which a `call` must call one."""

    kind: Literal["schema", "text", "call"]
    constraint: Constraint
    wanted: str = ""
    tools: tuple[Tool, ...] = ()

    def check(self, text: str) -> None:
        """Raises AssertionError when this isn't an answer of the form."""
        match self.kind:
            case "schema":
                _validate(text, self.wanted)
            case "text":
                assert re.fullmatch(self.wanted, text), f"{text!r} is not what {self.wanted!r} says"
            case "call":
                self._check_call(text)

    def _check_call(self, text: str) -> None:
        stream = HERMES.stream(self.tools, ONE_CALL)
        news = stream.push(text).then(stream.finish(cut=False))
        assert stream.has_calls, f"{text!r} has no call"
        assert not news.text.strip(), f"{text!r} has text beside its call"
        name = "".join(call.name or "" for call in news.calls)
        (tool,) = (tool for tool in self.tools if tool.name == name)
        _validate("".join(call.arguments for call in news.calls), tool.parameters)


def _validate(text: str, schema: str) -> None:
    import jsonschema

    try:
        jsonschema.Draft202012Validator(json.loads(schema)).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        raise AssertionError(f"{text!r} is not what {schema} says") from error


def of_schema(schema: Any) -> Form:
    return Form("schema", Constraint("json_schema", schemas.admit(schema, strict=True, param="schema")), json.dumps(schema))


def of_pattern(pattern: str) -> Form:
    return Form("text", Constraint("regex", pattern), pattern)


def of_tools(*tools: Tool) -> Form:
    constraint = HERMES.constraint(tools, ONE_CALL, None)
    assert constraint, "a call must be made"
    return Form("call", constraint, tools=tools)


def object_of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def tool(name: str, **properties: Any) -> Tool:
    return Tool(name, parameters=json.dumps(object_of(**properties)), strict=True)


DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
SWITCH, MOVE = tool("switch", on={"type": "boolean"}), tool("move", steps=DIGIT, to={"enum": ["left", "right"]})

FORMS = [
    of_schema(object_of(id=DIGIT, ok={"type": "boolean"})),
    of_schema({"enum": ["red", "green", 12, None]}),
    of_schema({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}),
    of_schema({"type": "string", "maxLength": 6}),
    of_schema({"anyOf": [{"type": "null"}, DIGIT, object_of(name={"type": "string", "maxLength": 3})]}),
    of_schema({"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 2}}, "$ref": "#/$defs/n"}),
    Form("schema", Constraint("json_object"), '{"type": "object"}'),
    of_pattern("[A-Z]{3}-[0-9]{2,4}"),
    of_pattern("(yes|no|perhaps)( indeed)?"),
    Form("text", Constraint("grammar", 'start: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]{1,3}/\n'), r"[0-9]{1,3}(\+[0-9]{1,3})*"),
]
CALLS = [of_tools(SWITCH), of_tools(MOVE), of_tools(SWITCH, MOVE)]


def draw_form(rng: random.Random) -> Form:
    if rng.random() >= FRESH:
        return rng.choice(FORMS)
    word = _word(rng)
    match rng.randrange(3):
        case 0:
            return of_schema({"enum": [word, _word(rng), rng.randrange(1000)]})
        case 1:
            return of_schema(object_of(**{word: {"type": "boolean"}}))
        case _:
            return of_pattern(f"{word}[0-9]{{1,{rng.randint(2, 9)}}}")


def draw_call(rng: random.Random) -> Form:
    if rng.random() >= FRESH:
        return rng.choice(CALLS)
    return of_tools(SWITCH, tool(_word(rng), **{_word(rng): {"enum": [_word(rng), _word(rng)]}}))


def _word(rng: random.Random) -> str:
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=8))
