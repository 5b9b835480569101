"""Calls as Mistral's models write them, behind `[TOOL_CALLS]`: first a list, `[{"name": …, "arguments": {…}}, …]`; since version 11
of their tokenizer `name[ARGS]{…}`, with another `[TOOL_CALLS]` in front of each further call and sometimes `[CALL_ID]…` inside."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Literal

from deployments.tools.call import read_arguments, read_call
from deployments.tools.grammar import Grammar, Offer
from deployments.tools.marks import Mark, Marks
from deployments.tools.source import Malformed, Reading, Source

_LETTERS = string.ascii_letters + string.digits + "_-"


@dataclass(frozen=True)
class Mistral:
    calls: Mark
    arguments: Mark
    call_id: Mark
    style: Literal["list", "named"]

    @classmethod
    def of(cls, marks: Marks, style: Literal["list", "named"]) -> Mistral:
        return cls(marks.of("[TOOL_CALLS]"), marks.of("[ARGS]"), marks.of("[CALL_ID]"), style)

    def read(self, source: Source) -> Reading[None]:
        while True:
            yield from source.find(self.calls)
            style = yield from source.attempt(self._first(source))
            while style == "list":
                yield from source.space()
                if not (yield from source.sees(",")):
                    yield from source.skip("]")
                    break
                style = yield from source.attempt(self._next(source))

    def _first(self, source: Source) -> Reading[Literal["list", "named"]]:
        yield from source.expect(self.calls.text)
        yield from source.space()
        if not (yield from source.skip("[")):
            yield from self._named(source)
            return "named"
        yield from source.space()
        yield from read_call(source)
        return "list"

    def _next(self, source: Source) -> Reading[Literal["list"]]:
        yield from source.expect(",")
        yield from source.space()
        yield from read_call(source)
        return "list"

    def _named(self, source: Source) -> Reading[None]:
        name = yield from source.word(_LETTERS, 64)
        if (yield from source.skip(self.call_id.text)):
            yield from source.word(_LETTERS, 64)
        if not (yield from source.skip(self.arguments.text)) and not name:
            raise Malformed
        yield from source.space()
        if (yield from source.peek()) != "{":
            raise Malformed
        source.open(name)
        yield from read_arguments(source)

    def grammar(self, offer: Offer) -> str:
        grammar = Grammar(offer)
        if self.style == "named":
            behind = grammar.any_call("", self.arguments, "")
            many = f"{self.calls.lark} {behind} ({self.calls.lark} {behind})*"
        else:
            call = grammar.any_call('{"name": ', ', "arguments": ', "}")
            behind = f'/ ?/ "[" {call} (", " {call})* "]"' if offer.parallel else f'/ ?/ "[" {call} "]"'
            many = f"{self.calls.lark} {behind}"
        calls = many if offer.parallel else f"{self.calls.lark} {behind}"
        if offer.must_call:
            return grammar.start(calls)
        if self.calls.token is not None:
            return grammar.beside(calls)
        return grammar.triggered(self.calls.text, behind)
