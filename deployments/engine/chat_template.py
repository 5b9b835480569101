"""A model's chat template: messages and tools in, one text out. Knows nothing of token ids.

Templates are programs (Jinja) that come with the model. They run in Jinja's sandbox, with the functions and whitespace rules of
transformers' `apply_chat_template` except the clock, and with bounded output. What callers wrote can't become a control token:
see `ChatTemplate.render`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Never

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.errors import ContextLengthExceeded, InvalidRequest, ModelNotServable
from cluster.types import Message, Tool, ToolCall
from deployments.engine.control_tokens import BREAK, ControlTokens, isolate

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
"""Roles of the OpenAI API. Templates build control tokens from them (`<|role|>`), so no other word may stand there."""

SCHEMA_WORDS = frozenset({"type", "properties", "required", "items", "enum", "description", "title", "default", "format", "const"})
SCHEMA_WORDS |= {"additionalProperties", "anyOf", "oneOf", "allOf", "$ref", "$defs"}
SCHEMA_WORDS |= {"object", "array", "string", "number", "integer", "boolean", "null"}
"""Words of JSON Schema that templates look for, so that they stay as they are wherever they are the whole of a key or a value."""

Guard = Callable[[str], str]


class ChatTemplate:
    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str],
        control: ControlTokens,
        max_chars: int,
        markup: ControlTokens | None = None,
    ) -> None:
        """`special_tokens` are the names that templates may use (`bos_token`, ...); `markup` are control tokens that a model also
        reads in its own earlier answers. Raises ModelNotServable for bad syntax."""
        self._special_tokens = dict(special_tokens)
        self._special = control
        self._control = control | (markup or ControlTokens(()))
        self._max_chars = max_chars
        try:
            sandbox = _Sandbox(max_chars)
            self.knows_tools = any(name.name == "tools" for name in sandbox.parse(source).find_all(nodes.Name))
            self._template = sandbox.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelNotServable(f"the chat template has a mistake: {error}") from None

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """The prompt as text, with breaks in it that the tokenizer takes out.

        Control tokens inside of a message are defused. A template could still make one by cutting or joining contents, so the same
        chat is rendered once more with every character of the contents isolated: control tokens that are then still there are the
        template's own. Where both agree, the first is right; else the second, in which the template's string functions see the
        breaks too. Raises InvalidRequest for what the template refuses and ContextLengthExceeded for too long a text.

        Markup that an assistant wrote itself stays markup, so that a template can cut an earlier answer's reasoning out; special
        tokens don't.
        """
        for message in messages:
            if message.role not in ROLES:
                raise InvalidRequest(f"role must be one of {', '.join(sorted(ROLES))}", param="messages")
        control, own = self._control, self._special.defuse
        defused = self._expand(messages, tools, control.defuse, own)
        isolated = self._expand(messages, tools, isolate, isolate)
        if control.find(defused) == control.find(isolated):
            return defused
        if not any(map(self._has_markup, messages)) or self._special.find(defused) != self._special.find(isolated):
            return isolated
        return defused if control.find(defused) == control.find(self._expand(messages, tools, isolate, own)) else isolated

    def _has_markup(self, message: Message) -> bool:
        return message.role == "assistant" and bool(self._control.find(message.content))

    def _expand(self, messages: Sequence[Message], tools: Sequence[Tool], guard: Guard, own: Guard) -> str:
        pieces: list[str] = []
        room = self._max_chars
        try:
            for piece in self._template.generate(
                messages=[_plain(message, guard, own) for message in messages],
                tools=[_tool(tool, guard) for tool in tools] or None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            ):
                room -= len(piece) - piece.count(BREAK)
                if room < 0:
                    raise ContextLengthExceeded(f"the chat is longer than {self._max_chars} characters", param="messages")
                pieces.append(piece)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", param="messages") from None
        return "".join(pieces)


def _plain(message: Message, guard: Guard, own: Guard) -> dict[str, Any]:
    """A message in the form that transformers gives to templates."""
    plain: dict[str, Any] = {"role": message.role, "content": (own if message.role == "assistant" else guard)(message.content)}
    if message.name is not None:
        plain["name"] = guard(message.name)
    if message.tool_calls:
        plain["tool_calls"] = [_call(call, guard) for call in message.tool_calls]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = _short(message.tool_call_id)
    return plain


def _call(call: ToolCall, guard: Guard) -> dict[str, Any]:
    function = {"name": guard(call.name), "arguments": _guarded(json.loads(call.arguments), guard)}
    return {"id": _short(call.id), "type": "function", "function": function}


def _tool(tool: Tool, guard: Guard) -> dict[str, Any]:
    described = {} if tool.description is None else {"description": guard(tool.description)}
    parameters = _guarded(json.loads(tool.parameters), guard)
    return {"type": "function", "function": {"name": guard(tool.name), **described, "parameters": parameters}}


def _guarded(value: Any, guard: Guard) -> Any:
    """JSON with all its texts guarded, keys too."""
    if isinstance(value, str):
        return value if value in SCHEMA_WORDS else guard(value)
    if isinstance(value, list):
        return [_guarded(item, guard) for item in value]
    if isinstance(value, dict):
        return {_guarded(key, guard): _guarded(item, guard) for key, item in value.items()}
    return value


def _short(call_id: str) -> str:
    """A call's id as the prompt has it: nine letters and digits, which Mistral's templates insist on and others don't show. Made
    from the caller's, so that a result finds its call and nothing can be smuggled in."""
    digest = hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).digest()
    return base64.b32encode(digest).decode()[:9]


_ESCAPED_BREAK = json.dumps(BREAK).strip('"')


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as templates expect it. The sandbox bounds `range` but no operator, so repetition and powers are bounded here."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, max_chars: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self._max_chars = max_chars
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for repeated, times in ((left, right), (right, left)):
            if hasattr(repeated, "__len__") and len(repeated) * times > self._max_chars:
                raise SecurityError("repetition of a long text")
        if operator == "**" and abs(right) > 64:
            raise SecurityError("a power above 64")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; for a prompt its body is just text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON for a model, not for a page: nothing is escaped for HTML, unlike Jinja's own filter. A break stays one."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return text.replace(_ESCAPED_BREAK, BREAK) if ensure_ascii else text


def _raise_exception(message: str) -> Never:
    raise jinja2.TemplateError(message)
