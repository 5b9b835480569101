"""What a model writes, read as if it were whole while it comes in pieces.

A parser is a generator: wherever it needs more text than there is, it waits in a `yield`. So a format reads top to bottom, and how
its text was cut can't change what is found. Everything read is either said (it is the answer's text) or part of a call; a call
that turns out to be malformed is said after all, whole.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal, NamedTuple, TypeVar

from deployments.tools.json_scanner import JsonScanner
from deployments.tools.marks import Mark, visible

Result = TypeVar("Result")
Reading = Generator[None, None, Result]
"""Yields to wait for more text."""

SPACE = " \t\n\r"


class Malformed(Exception):
    """Raised inside of a call that isn't one."""


class Ended(Exception):
    """Raised where a parser wants more text than there will be."""


class Said(NamedTuple):
    """Text of the answer, and how many characters were read for it: those that stand for special tokens aren't said."""

    text: str
    length: int


class Unsaid(NamedTuple):
    """So many characters are no text of the answer."""

    length: int


class Part(NamedTuple):
    """News of a call: its name with the first, its arguments as they come; how it ended."""

    name: str | None = None
    arguments: str = ""
    end: Literal["complete", "broken"] | None = None


class Source:
    """`names`: the functions that may be called. `found` collects what was read, until somebody takes it."""

    def __init__(self, names: frozenset[str], *, parallel: bool = True) -> None:
        self.names = names
        self.found: list[Said | Unsaid | Part] = []
        self.num_calls = 0
        self._parallel = parallel
        self._text = ""
        self._at = 0
        self._ended: Literal["whole", "cut"] | None = None
        self._gap = ""  # whitespace that belongs to the text, unless a call or the end follows
        self._tried: list[str] | None = None  # what was read of a call that isn't complete yet
        self._is_open = False  # the call's name was told already
        self._after_call = False

    def push(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self, *, cut: bool) -> None:
        """No more text will come. `cut`: the model had no room to go on, so an unfinished call isn't its fault."""
        self._ended = "cut" if cut else "whole"

    @property
    def has_enough(self) -> bool:
        """Whether there is a call and there may be no second."""
        return self.num_calls > 0 and not self._parallel

    # reading

    def find(self, mark: Mark) -> Reading[None]:
        """Says the text up to the mark, and stops in front of it. Whitespace in front of a call isn't said."""
        while (at := self._text.find(mark.text, self._at)) < 0:
            waits = _longest_start(self._text, self._at, mark.text)
            self._say(self._read(len(self._text) - waits))
            yield from self._more()
        self._say(self._read(at))

    def sees(self, text: str) -> Reading[bool]:
        """Whether this comes next."""
        while len(self._text) - self._at < len(text):
            if self._ended or not text.startswith(self._text[self._at :]):
                return False
            yield
        return self._text.startswith(text, self._at)

    def skip(self, text: str) -> Reading[bool]:
        """Reads this if it comes next."""
        found = yield from self.sees(text)
        if found:
            self._drop(self._at + len(text))
        return found

    def expect(self, text: str) -> Reading[None]:
        """Reads this. Raises Malformed where something else comes."""
        if not (yield from self.skip(text)):
            if text.startswith(self._text[self._at :]):
                raise Ended
            raise Malformed

    def space(self) -> Reading[None]:
        """Reads whitespace, up to something else or the end."""
        while True:
            end = self._at
            while end < len(self._text) and self._text[end] in SPACE:
                end += 1
            if self._tried is None:
                self._gap += self._read(end)
            else:
                self._drop(end)
            if self._at < len(self._text) or self._ended:
                return
            yield

    def peek(self) -> Reading[str]:
        """The next character. Raises Ended."""
        while self._at == len(self._text):
            yield from self._more()
        return self._text[self._at]

    def word(self, letters: str, most: int) -> Reading[str]:
        """As many of these letters as come, up to `most`. Raises Ended when nothing else follows them."""
        word = ""
        while len(word) <= most and (letter := (yield from self.peek())) in letters:
            word += letter
            self._drop(self._at + 1)
        return word

    def value(self) -> Reading[str]:
        """One JSON value, whole."""
        parts: list[str] = []
        yield from self._value(parts)
        return "".join(parts)

    def arguments(self) -> Reading[None]:
        """One JSON value, told as it comes as the arguments of the call that is open."""
        yield from self._value(None)

    def _value(self, parts: list[str] | None) -> Reading[None]:
        scanner = JsonScanner()
        while True:
            piece = self._drop(scanner.feed(self._text, self._at))
            if piece and parts is None:
                self.tell(piece)
            elif piece and parts is not None:
                parts.append(piece)
            if scanner.broken:
                raise Malformed
            if scanner.done:
                return
            yield from self._more()

    # calls

    def attempt(self, call: Reading[Result]) -> Reading[Result | None]:
        """A call, or nothing: then what was read of it has been said. Ended passes through."""
        self._tried, self._is_open = [self._gap], False
        self._gap = ""
        try:
            result = yield from call
        except Malformed:
            self._fall_back()
            return None
        except Ended:
            if not (self._is_open and self._ended == "cut"):
                self._fall_back()
            raise
        self.found.append(Part(end="complete"))
        self.found.append(Unsaid(sum(map(len, self._tried))))
        self.num_calls += 1
        self._tried, self._after_call = None, True
        if self.has_enough:
            raise Ended
        return result

    def open(self, name: str) -> None:
        """From here on this is a call of `name`. Raises Malformed for a function that may not be called."""
        if name not in self.names or self._is_open:
            raise Malformed
        self._is_open = True
        self.found.append(Part(name=name))

    def tell(self, arguments: str) -> None:
        self.found.append(Part(arguments=arguments))

    def finish(self) -> None:
        """After Ended: says what is left. Whitespace behind a call isn't text, nor is anything behind the last one there may be."""
        rest = self._read(len(self._text))
        is_part_of_call = self._tried is not None or self.has_enough
        if not is_part_of_call and not (self._after_call and not (self._gap + rest).strip(SPACE)):
            self._say(rest, at_end=True)

    def _fall_back(self) -> None:
        if self._is_open:
            self.found.append(Part(end="broken"))
        read, self._tried = "".join(self._tried or ()), None
        self._say(read)

    def _say(self, text: str, *, at_end: bool = False) -> None:
        if self._gap:
            text = self._gap + text
        said = text if at_end else text.rstrip(SPACE)
        self._gap = text[len(said) :]
        if said:
            self.found.append(Said(visible(said), len(said)))
            self._after_call = False

    # the text itself

    def _read(self, end: int) -> str:
        start, self._at = self._at, end
        return self._text[start:end]

    def _drop(self, end: int) -> str:
        """Reads what isn't said, unless the call comes to nothing."""
        read = self._read(end)
        if self._tried is not None:
            self._tried.append(read)
        elif read:
            self.found.append(Unsaid(len(self._gap + read)))
            self._gap = ""
        return read

    def _more(self) -> Reading[None]:
        if self._ended:
            raise Ended
        yield


def _longest_start(text: str, start: int, mark: str) -> int:
    """Length of the longest end of `text`, from `start` on, with which `mark` may begin."""
    most = min(len(mark) - 1, len(text) - start)
    return next((n for n in range(most, 0, -1) if mark.startswith(text[-n:])), 0)
