"""Tools in requests: functions that a model may call, which of them it must, and calls of earlier turns. Strict and bounded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import pydantic
from pydantic import Field, StringConstraints, WithJsonSchema
from pydantic_core import PydanticCustomError

from cluster import types
from cluster.errors import InvalidRequest
from deployments.engine import schemas
from deployments.gateway.openai.bounded import Bounded

MAX_TOOLS = 128
MAX_DESCRIPTION = 16_384
MAX_SCHEMA = 1 << 16
"""Characters of one function's schema."""
MAX_ARGUMENTS = 1 << 18
MAX_DEPTH = 64
"""Levels of one call's arguments."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
CallId = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Function(Bounded):
    name: Name
    description: str | None = Field(default=None, max_length=MAX_DESCRIPTION)
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @pydantic.field_validator("parameters")
    @classmethod
    def _parameters(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and value.get("type", "object") != "object":
            raise PydanticCustomError("invalid_value", "Input should be a JSON schema of an object")
        if value is not None and len(json.dumps(value, ensure_ascii=False)) > MAX_SCHEMA:
            raise PydanticCustomError("invalid_value", "At most {most} characters of JSON are accepted", {"most": MAX_SCHEMA})
        return value


class Tool(Bounded):
    type: Literal["function"]
    function: Function

    @property
    def asked(self) -> types.Tool:
        function, default = self.function, types.Tool("")
        schema = json.dumps(function.parameters, ensure_ascii=False) if function.parameters else default.parameters
        return types.Tool(function.name, function.description, schema, bool(function.strict))


class Chosen(Bounded):
    name: Name


class ChosenTool(Bounded):
    type: Literal["function"]
    function: Chosen


class AllowedTools(Bounded):
    mode: Literal["auto", "required"]
    tools: list[ChosenTool] = Field(min_length=1, max_length=MAX_TOOLS)


class Choice(Bounded):
    """`tool_choice`: a word, one function, or some of them. A word is kept as the type."""

    type: Literal["none", "auto", "required", "function", "allowed_tools"]
    function: Chosen | None = None
    allowed_tools: AllowedTools | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _word(cls, value: object) -> object:
        if value in ("none", "auto", "required"):
            return {"type": value}
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(value, dict) or kind not in ("function", "allowed_tools"):
            raise PydanticCustomError(
                "invalid_value", "Input should be 'none', 'auto', 'required' or an object of type 'function' or 'allowed_tools'"
            )
        if value.get(kind) is None:
            raise PydanticCustomError("missing", "An object of type '{kind}' needs the field '{kind}'", {"kind": kind})
        return value

    def asked(self, parallel: bool) -> types.ToolChoice:
        if self.function is not None:
            return types.ToolChoice("required", (self.function.name,), parallel=False)
        if self.allowed_tools is not None:
            names = tuple(dict.fromkeys(tool.function.name for tool in self.allowed_tools.tools))
            return types.ToolChoice(self.allowed_tools.mode, names, parallel)
        assert self.type != "function"
        assert self.type != "allowed_tools"
        return types.ToolChoice(self.type, (), parallel)


ToolChoice = Annotated[
    Choice,
    WithJsonSchema(
        {"anyOf": [{"type": "string", "enum": ["none", "auto", "required"]}, {"type": "object", "required": ["type"]}]},
    ),
]


class CalledFunction(Bounded):
    name: Name
    arguments: str = Field(max_length=MAX_ARGUMENTS)


class Call(Bounded):
    """A call that the model made in an earlier turn."""

    id: CallId
    type: Literal["function"]
    function: CalledFunction

    @property
    def made(self) -> types.ToolCall:
        return types.ToolCall(self.id, self.function.name, self.function.arguments)


def check_choice(tools: Sequence[Tool], choice: Choice | None) -> None:
    """What holds between tools and choice. Raises InvalidRequest."""
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.function.name in names:
            raise InvalidRequest("Two tools have the same name.", param=f"tools[{index}].function.name")
        names.add(tool.function.name)
        if tool.function.strict:
            schemas.admit(tool.function.parameters or {}, strict=True, param=f"tools[{index}].function.parameters")
    if choice is None or choice.type in ("none", "auto"):
        return
    if not tools:
        raise InvalidRequest("tool_choice is only allowed when tools are given.", param="tool_choice")
    for name in choice.asked(True).names:
        if name not in names:
            raise InvalidRequest(f"tool_choice names {name!r}, which is not among the tools.", param="tool_choice")


def check_arguments(call: Call, where: str) -> None:
    """A model sees earlier arguments as the object that they are. Raises InvalidRequest."""
    param = f"{where}.function.arguments"
    try:
        arguments = msgspec.json.decode(call.function.arguments)
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequest("The arguments of a call must be the text of a JSON object.", param=param) from None
    if not isinstance(arguments, dict):
        raise InvalidRequest("The arguments of a call must be the text of a JSON object.", param=param)
    level: list[Any] = [arguments]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        level = [child for child in level if isinstance(child, (dict, list))]
    if level:
        raise InvalidRequest(f"The arguments are nested deeper than {MAX_DEPTH} levels.", param=param)
