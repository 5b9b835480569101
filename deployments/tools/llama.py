"""Calls as Llama 3.1, 3.2 and 3.3 write them: `{"name": …, "parameters": {…}}`, alone or behind `<|python_tag|>`.

A whole answer is a call or text; `;` joins several calls. The models' own templates render one call a turn, so no more than one is
ever forced.
"""

from __future__ import annotations

from dataclasses import dataclass

from deployments.tools.call import read_call
from deployments.tools.grammar import Grammar, Offer
from deployments.tools.marks import Mark, Marks
from deployments.tools.source import Reading, Source


@dataclass(frozen=True)
class Llama:
    tag: Mark

    @classmethod
    def of(cls, marks: Marks) -> Llama:
        return cls(marks.of("<|python_tag|>"))

    def read(self, source: Source) -> Reading[None]:
        yield from source.space()
        if not (yield from source.sees("{")):
            yield from source.find(self.tag)
        while True:
            made = yield from source.attempt(self._call(source))
            while made is not None:
                yield from source.space()
                if not (yield from source.sees(";")):
                    break
                made = yield from source.attempt(self._next(source))
            yield from source.find(self.tag)

    def _call(self, source: Source) -> Reading[bool]:
        yield from source.skip(self.tag.text)
        yield from source.space()
        yield from read_call(source)
        return True

    def _next(self, source: Source) -> Reading[bool]:
        yield from source.expect(";")
        yield from source.space()
        return (yield from self._call(source))

    def grammar(self, offer: Offer) -> str:
        grammar = Grammar(offer)
        grammar.rule("call", grammar.any_call('{"name": ', ', "parameters": ', "}"))
        if offer.must_call:
            return grammar.start("call")
        if offer.answer is not None:  # JSON of two kinds: the tag tells them apart
            return grammar.start(f"{grammar.text()} | {self.tag.lark} call")
        return grammar.start(f"{grammar.text(not_first='{')}? | call | {self.tag.lark} call")
