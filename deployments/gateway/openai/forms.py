"""What form an answer shall have, as callers say it: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_` names.

All of them become one `Constraint`; what it costs to compile is the model's replica to find out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from cluster.errors import InvalidRequest
from cluster.types import Constraint
from deployments.engine import schemas
from deployments.gateway.openai.bounded import Bounded

MAX_PATTERN = 4096
MAX_GRAMMAR = 64 << 10
MAX_CHOICES = 1024
KINDS = ("json", "regex", "choice", "grammar", "json_object")
_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~/]")
_NEUTRAL: tuple[Any, ...] = (None, False)


class JsonSchemaFormat(Bounded):
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = Field(default=None, max_length=4096)
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Bounded):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Bounded):
    """One of `KINDS`. The other fields that vLLM has can't be honoured, and are refused."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None
    structural_tag: Any = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


def constraint(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None, older: Mapping[str, Any]
) -> Constraint | None:
    """Raises InvalidRequest, with the field that says too much or what can't be as `param`."""
    asked = [found for found in (_from_format(response_format), _from_structured(structured)) if found]
    asked += [_of(kind, value, f"guided_{kind}") for kind, value in older.items()]
    if len(asked) > 1:
        raise InvalidRequest("An answer can have one form; more than one is asked for.", param=asked[1].param)
    return asked[0] if asked else None


def _from_format(asked: ResponseFormat | None) -> Constraint | None:
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return Constraint("json_object", param="response_format")
    if asked.json_schema is None:
        param = "response_format.json_schema"
        raise InvalidRequest(f"Missing required parameter: {param}.", param=param, code="missing_required_parameter")
    param = "response_format.json_schema.schema"
    schema = asked.json_schema.schema_
    if schema is None:
        return Constraint("json_object", param=param)
    return Constraint("json_schema", schemas.admit(schema, strict=bool(asked.json_schema.strict), param=param), param)


def _from_structured(asked: StructuredOutputs | None) -> Constraint | None:
    if asked is None:
        return None
    for name in ("whitespace_pattern", "structural_tag", "disable_any_whitespace", "disable_additional_properties"):
        if getattr(asked, name) not in _NEUTRAL:
            param = f"structured_outputs.{name}"
            message = f"Unsupported parameter: {param} is not supported by this server."
            raise InvalidRequest(message, param=param, code="unsupported_parameter")
    values = {"json": asked.json_, **{kind: getattr(asked, kind) for kind in KINDS[1:]}}
    given = [kind for kind, value in values.items() if value not in _NEUTRAL]
    if len(given) != 1:
        raise InvalidRequest(f"structured_outputs takes one of {', '.join(KINDS)}.", param="structured_outputs")
    return _of(given[0], values[given[0]], f"structured_outputs.{given[0]}")


def _of(kind: str, value: Any, param: str) -> Constraint:
    match kind:
        case "json":
            return Constraint("json_schema", schemas.admit(value, strict=False, param=param), param)
        case "regex":
            schemas.check_repetitions(value, param)
            return Constraint("regex", _bounded(value, MAX_PATTERN, param), param)
        case "choice":
            return Constraint("regex", _either(value, param), param)
        case "grammar":
            return Constraint("grammar", _bounded(value, MAX_GRAMMAR, param), param)
        case _:
            return Constraint("json_object", param=param)


def _bounded(text: str, most: int, param: str) -> str:
    if not 0 < len(text.encode()) <= most:
        raise InvalidRequest(f"{param} must have 1 to {most} bytes.", param=param)
    return text


def _either(choices: list[str], param: str) -> str:
    """An expression that matches these texts alone."""
    if not 0 < len(choices) <= MAX_CHOICES or not all(choices):
        raise InvalidRequest(f"{param} must have 1 to {MAX_CHOICES} choices, none of them empty.", param=param)
    return _bounded("|".join(_SPECIAL.sub(r"\\\g<0>", choice) for choice in choices), schemas.MAX_BYTES, param)
