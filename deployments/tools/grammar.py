"""Grammars that force or check calls, in the Lark notation of llguidance (its docs/syntax.md), with the functions' schemas inside.

Pure text: whoever runs the grammar knows tokens. JSON is written with the one whitespace that chat templates show to models (`", "`
and `": "`), so that a constrained model can't dwell on spaces.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import InvalidRequest
from cluster.types import Constraint, Tool, ToolChoice
from deployments.engine import schemas
from deployments.tools.marks import Mark, literal

_SEPARATORS = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


@dataclass(frozen=True)
class Offer:
    """What a grammar is made for: the functions that may be called, whether one must be, whether several may, and the form that
    an answer without a call must have."""

    tools: tuple[Tool, ...]
    must_call: bool
    parallel: bool
    answer: Constraint | None = None

    @classmethod
    def of(cls, tools: Sequence[Tool], choice: ToolChoice, answer: Constraint | None) -> Offer:
        allowed = tuple(tool for tool in tools if not choice.names or tool.name in choice.names)
        return cls(allowed, choice.mode == "required", choice.parallel, answer)

    def needs_grammar(self, offered: int) -> bool:
        """Whether a parser alone can't keep the promise. `offered`: the functions that the model was shown."""
        return self.must_call or self.answer is not None or len(self.tools) < offered or any(tool.strict for tool in self.tools)


class Grammar:
    """Rules as they are added; the names of those that a function makes are numbers, its own name is only ever text."""

    def __init__(self, offer: Offer) -> None:
        self._offer = offer
        self._rules: dict[str, str] = {}

    def rule(self, name: str, body: str) -> str:
        self._rules[name] = body
        return name

    def any_call(self, before_name: str, before_arguments: str | Mark, after: str) -> str:
        """A rule for one call of one of the functions. Names are quoted where something stands before them."""
        calls = []
        for number, tool in enumerate(self._offer.tools):
            arguments = self.rule(f"arguments_{number}", f"%json {json.dumps(schema(tool))}")
            name = json.dumps(tool.name) if before_name else tool.name
            if isinstance(before_arguments, Mark):
                head = f"{literal(name)} {before_arguments.lark}"
            else:
                head = literal(before_name + name + before_arguments)
            calls.append(self.rule(f"call_{number}", f"{head} {arguments}" + (f" {literal(after)}" if after else "")))
        return self.rule("any_call", " | ".join(calls))

    def text(self, not_first: str = "") -> str:
        """A rule for an answer without a call: any text, or the form that was asked for. `not_first`: its first character behind
        whitespace isn't this one."""
        match self._offer.answer:
            case None:
                self._rules["TEXT"] = rf"/\s*[^\s{not_first}](.|\n)*/" if not_first else r"/(.|\n)*/"
                return "TEXT"
            case Constraint("json_object" | "json_schema", text):
                form = json.loads(text) if text else {"type": "object"}
                return self.rule("answer", f"%json {json.dumps({'x-guidance': _SEPARATORS, **form})}")
            case constraint:
                raise InvalidRequest(f"A {constraint.kind} for the answer can't stand beside tools.", param="tools")

    def beside(self, calls: str) -> str:
        """Text and then calls, where a special token tells them apart; one or the other where the text has a form."""
        text = self.text()
        return self.start(f"{text} ({calls})?" if self._offer.answer is None else f"{text} | {calls}")

    def triggered(self, trigger: str, behind: str) -> str:
        """Any text; from the moment it holds `trigger`, a call must follow."""
        text = self.text()
        if self._offer.answer is not None:
            calls = f"({literal(trigger)} {behind} /\\s*/)" + ("+" if self._offer.parallel else "")
            return self.start(f"{text} | {calls}")
        self.rule("tail", text)
        self.rule("lead[lazy]", f"{text} {literal(trigger)}")  # lazy, so that the trigger can't be text
        return self.start(f"(lead {behind})* tail" if self._offer.parallel else f"lead {behind} | tail")

    def start(self, body: str) -> str:
        return "\n".join([f"start: {body}", *(f"{name}: {rule}" for name, rule in self._rules.items())]) + "\n"


def schema(tool: Tool) -> dict[str, Any]:
    """The arguments' schema as llguidance takes it: what a strict function says, to the letter; of another one as much as the
    library knows."""
    said: dict[str, Any] = json.loads(tool.parameters)
    said = json.loads(schemas.admit(said, strict=True, param="tools")) if tool.strict else said
    return {"x-guidance": {**_SEPARATORS, "lenient": not tool.strict}, "type": "object", **said}
