"""Marks of calls in a model's text: words that it writes, or special tokens, which stand for no text and need one here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from deployments.engine.tokenizer import Tokenizer

HIDDEN = "\ud800-\ud80f"
"""What parsers see where the model wrote a special token, as a range of a regular expression: halves of surrogate pairs, which no
text has. None of them leaves this package."""

_HIDDEN = re.compile(f"[{HIDDEN}]")


@dataclass(frozen=True)
class Mark:
    """`text` is what a parser looks for; `token` is the id of a special token, none where the mark is text like any other."""

    text: str
    token: int | None = None

    @property
    def lark(self) -> str:
        """This mark in llguidance's notation: a literal, or a token by number."""
        return literal(self.text) if self.token is None else f"<[{self.token}]>"


class Marks:
    """Makes marks for one tokenizer, and remembers those that are special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: Iterator[str] = map(chr, range(0xD800, 0xD810))
        self.shown: dict[int, str] = {}

    def of(self, word: str) -> Mark:
        token = self._tokenizer.token_id(word)
        if token is None or token not in self._tokenizer.special_ids:
            return Mark(word)
        self.shown[token] = next(self._texts)
        return Mark(self.shown[token], token)


def literal(text: str) -> str:
    """A string of Lark's notation."""
    return json.dumps(text, ensure_ascii=False)


def visible(text: str) -> str:
    """Without the characters that stand for special tokens."""
    return text if text.isascii() else _HIDDEN.sub("", text)
