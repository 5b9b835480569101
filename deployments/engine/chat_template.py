"""A model's chat template: messages in, one text out. Knows nothing of token ids.

Templates are programs (Jinja) that come with the model. They run in Jinja's sandbox, with the functions and whitespace rules of
transformers' `apply_chat_template` except the clock, and with bounded output. What callers wrote can't become a control token:
see `ChatTemplate.render`.
"""

from __future__ import annotations

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
from cluster.types import Message
from deployments.engine.control_tokens import BREAK, ControlTokens, isolate

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
"""Roles of the OpenAI API. Templates build control tokens from them (`<|role|>`), so no other word may stand there."""


class ChatTemplate:
    def __init__(self, source: str, *, special_tokens: Mapping[str, str], control: ControlTokens, max_chars: int) -> None:
        """`special_tokens` are the names that templates may use (`bos_token`, ...). Raises ModelNotServable for bad syntax."""
        self._special_tokens = dict(special_tokens)
        self._control = control
        self._max_chars = max_chars
        try:
            self._template = _Sandbox(max_chars).from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelNotServable(f"the chat template has a mistake: {error}") from None

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt as text, with breaks in it that the tokenizer takes out.

        Control tokens inside of a message are defused. A template could still make one by cutting or joining contents, so the same
        chat is rendered once more with every character of the contents isolated: control tokens that are then still there are the
        template's own. Where both agree, the first is right; else the second, in which the template's string functions see the
        breaks too. Raises InvalidRequest for what the template refuses and ContextLengthExceeded for too long a text.
        """
        for message in messages:
            if message.role not in ROLES:
                raise InvalidRequest(f"role must be one of {', '.join(sorted(ROLES))}", param="messages")
        defused = self._expand(messages, self._control.defuse)
        isolated = self._expand(messages, isolate)
        return defused if self._control.find(defused) == self._control.find(isolated) else isolated

    def _expand(self, messages: Sequence[Message], guard: Callable[[str], str]) -> str:
        pieces: list[str] = []
        room = self._max_chars
        try:
            for piece in self._template.generate(
                messages=[_plain(message, guard) for message in messages],
                tools=None,
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


def _plain(message: Message, guard: Callable[[str], str]) -> dict[str, str]:
    plain = {"role": message.role, "content": guard(message.content)}
    return plain if message.name is None else {**plain, "name": guard(message.name)}


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
    """JSON for a model, not for a page: nothing is escaped for HTML, unlike Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> Never:
    raise jinja2.TemplateError(message)
