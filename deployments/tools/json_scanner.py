"""Where a JSON value ends in text that comes in pieces, and the first character at which it can't be JSON any more.

RFC 8259, to the letter: what passes here, every parser reads. Nothing is decoded and nothing is kept but the open brackets.
"""

from __future__ import annotations

import re
from typing import Literal

from deployments.tools.marks import HIDDEN

MAX_DEPTH = 128
"""Deeper values are malformed: parsers of callers give up at some depth, too."""

_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(rf'[^"\\\x00-\x1f{HIDDEN}]*')
_NUMBER_PART = re.compile(r"[-+.0-9eE]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?\Z")
_HEX = frozenset("0123456789abcdefABCDEF")
_WORDS = {"t": "true", "f": "false", "n": "null"}

_Expected = Literal[
    "value", "value or ]", "key", "key or }", "colon", "comma", "string", "escape", "hex", "word", "number"
]  # the last five: inside of a scalar


class JsonScanner:
    """One value. `done` once it is complete; `broken` once no continuation could complete it."""

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self._expected: _Expected = "value"
        self._closers: list[str] = []
        self._is_key = False
        self._part = ""  # of a number; what is still to come of a word; hexadecimal digits that are there

    def feed(self, text: str, start: int = 0) -> int:
        """Reads on, from `start`. Returns where it stopped: behind the value, at the wrong character, or at the text's end."""
        at = start
        while at < len(text) and not (self.done or self.broken):
            at = self._scalar(text, at) if self._expected in _INSIDE else self._between(text, at)
        return at

    def _between(self, text: str, at: int) -> int:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # matches the empty text, too
        if at == len(text):
            return at
        character, expected = text[at], self._expected
        if expected == "comma":
            return self._separator(character, at)
        if expected == "colon":
            return self._step(at, character == ":", "value")
        if character in "]}" and expected in ("value or ]", "key or }"):
            return self._close(character, at)
        if expected in ("key", "key or }"):
            self._is_key = True
            return self._step(at, character == '"', "string")
        return self._value(character, at)

    def _value(self, character: str, at: int) -> int:
        if character in "{[":
            self._closers.append("}" if character == "{" else "]")
            return self._step(at, len(self._closers) <= MAX_DEPTH, "key or }" if character == "{" else "value or ]")
        self._is_key = False
        if character == '"':
            return self._step(at, True, "string")
        if character in _WORDS:
            self._part = _WORDS[character][1:]
            return self._step(at, True, "word")
        self._part = character
        return self._step(at, character == "-" or character in "0123456789", "number")

    def _separator(self, character: str, at: int) -> int:
        if character == "," and self._closers:
            return self._step(at, True, "key" if self._closers[-1] == "}" else "value")
        return self._close(character, at)

    def _close(self, character: str, at: int) -> int:
        if not self._closers or self._closers[-1] != character:
            return self._step(at, False, "comma")
        self._closers.pop()
        self._complete()
        return at + 1

    def _scalar(self, text: str, at: int) -> int:
        match self._expected:
            case "string":
                return self._string(text, _PLAIN.match(text, at).end())  # type: ignore[union-attr]
            case "number":
                end = _NUMBER_PART.match(text, at).end()  # type: ignore[union-attr]
                self._part += text[at:end]
                if end < len(text):
                    self.broken = _NUMBER.match(self._part) is None
                    self._complete()
                return end
            case "escape":
                self._part = ""
                return self._step(at, text[at] in '"\\/bfnrtu', "hex" if text[at] == "u" else "string")
            case "hex":
                self._part += text[at]
                return self._step(at, text[at] in _HEX, "string" if len(self._part) == 4 else "hex")
        right, self._part = text[at] == self._part[0], self._part[1:]  # a word
        if right and not self._part:
            self._complete()
            return at + 1
        return self._step(at, right, "word")

    def _string(self, text: str, at: int) -> int:
        if at == len(text):
            return at
        if text[at] == '"':
            if self._is_key:
                return self._step(at, True, "colon")
            self._complete()
            return at + 1
        return self._step(at, text[at] == "\\", "escape")

    def _step(self, at: int, right: bool, then: _Expected) -> int:
        """Past this character, if it is right."""
        if not right:
            self.broken = True
            return at
        self._expected = then
        return at + 1

    def _complete(self) -> None:
        self._expected = "comma"
        self.done = not self._closers and not self.broken


_INSIDE = frozenset({"string", "escape", "hex", "word", "number"})
