"""Text from tokens as they come: whole characters only, cut at the first stop string. Knows nothing of why tokens come.

Work per token is bounded by the length of the token and of the stop strings, however long the text already is.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class TokenBytes(Protocol):
    """What is needed of a tokenizer."""

    special_ids: frozenset[int]

    def token_bytes(self, token_id: int) -> bytes: ...

    def opening_bytes(self, token_id: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Text:
    """News: text that is certain by now (may be empty), whether a stop string ended it, and how many of the tokens it took."""

    text: str
    stopped: bool
    num_tokens: int


class Detokenizer:
    """The text of one sequence. `stop` ends it where the first of these strings is complete; the string itself isn't shown."""

    def __init__(
        self,
        tokenizer: TokenBytes,
        stop: Sequence[str] = (),
        *,
        prompt_ids: Iterable[int] = (),
        shown: Mapping[int, str] | None = None,
    ) -> None:
        """`prompt_ids`: the tokens before; after any text the first token keeps its space. `shown`: text for special tokens, which
        have none otherwise; it may hold what no token spells."""
        self._tokenizer = tokenizer
        self._shown = shown or {}
        self._stop = tuple(string for string in stop if string)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._held = ""  # may be the start of a stop string
        self._begun = any(token_id not in tokenizer.special_ids for token_id in prompt_ids)
        self.stopped = False

    def push(self, token_ids: Sequence[int]) -> Text:
        """Takes tokens in; after a stop it takes none."""
        news: list[str] = []
        for used, token_id in enumerate(token_ids):
            if self.stopped:
                return Text("".join(news), True, used)
            news.append(self._advance(self._text(token_id)))
        return Text("".join(news), self.stopped, len(token_ids))

    def finish(self) -> Text:
        """What was held back, when no token will follow. Half of a character at the end becomes U+FFFD."""
        if self.stopped:
            return Text("", True, 0)
        news = self._advance(self._decode(b"", True))
        held, self._held = self._held, ""
        return Text(news + held, self.stopped, 0)

    def _text(self, token_id: int) -> str:
        if token_id in self._shown:
            return self._decode(b"", True) + self._shown[token_id]
        return self._decode(self._bytes(token_id))

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._tokenizer.special_ids:
            return b""
        if self._begun:
            return self._tokenizer.token_bytes(token_id)
        self._begun = True
        return self._tokenizer.opening_bytes(token_id)

    def _advance(self, text: str) -> str:
        """The part of the held text and `text` that is certain now; the rest is held, or dropped behind a stop string."""
        text = self._held + text
        if found := first_stop(text, self._stop):
            self.stopped, self._held = True, ""
            return text[: found[0]]
        keep = len(text) - _longest_start(text, self._stop)
        self._held = text[keep:]
        return text[:keep]


def first_stop(text: str, stop: Sequence[str]) -> tuple[int, int] | None:
    """Start and end of the stop string that is complete first; of two that end together, the longer."""
    found = [(at + len(string), at) for string in stop if (at := text.find(string)) >= 0]
    if not found:
        return None
    end, start = min(found)
    return start, end


def _longest_start(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` with which a stop string may begin."""
    longest = max(map(len, stop), default=1) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)
