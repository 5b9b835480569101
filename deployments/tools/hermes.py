"""Calls as Hermes and Qwen write them: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, text before and between allowed."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.tools.call import read_call
from deployments.tools.grammar import Grammar, Offer
from deployments.tools.marks import Mark, Marks
from deployments.tools.source import Reading, Source


@dataclass(frozen=True)
class Hermes:
    begin: Mark
    end: Mark

    @classmethod
    def of(cls, marks: Marks) -> Hermes:
        return cls(marks.of("<tool_call>"), marks.of("</tool_call>"))

    def read(self, source: Source) -> Reading[None]:
        while True:
            yield from source.find(self.begin)
            if (yield from source.attempt(self._call(source))) is not None:
                yield from source.space()
                yield from source.skip(self.end.text)

    def _call(self, source: Source) -> Reading[bool]:
        yield from source.expect(self.begin.text)
        yield from source.space()
        yield from read_call(source)
        return True

    def grammar(self, offer: Offer) -> str:
        grammar = Grammar(offer)
        body = grammar.any_call('{"name": ', ', "arguments": ', "}")
        grammar.rule("call", f'{self.begin.lark} "\\n" {body} "\\n" {self.end.lark}')
        if offer.must_call:
            return grammar.start('call ("\\n" call)*' if offer.parallel else "call")
        if self.begin.token is not None:
            return grammar.beside('call ("\\n" call)*' if offer.parallel else "call")
        return grammar.triggered(self.begin.text, f'"\\n" {body} "\\n" {self.end.lark}')
