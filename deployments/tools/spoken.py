"""Which tokens of an answer are its text, where some of them write calls: theirs are the log probabilities that callers see.

Characters are decided in the order in which they came, and a token goes with its last one.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Mapping

from cluster.types import TokenLogprob
from deployments.engine.tokenizer import Tokenizer
from deployments.tools.source import Said, Unsaid


class Spoken:
    """Tokens of one choice that wait for what becomes of their characters."""

    def __init__(self, tokenizer: Tokenizer, shown: Mapping[int, str]) -> None:
        """`shown`: special tokens that stand for characters here."""
        self._tokenizer = tokenizer
        self._shown = shown
        self._length = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = False
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()  # by the place behind a token's last character
        self._come = 0
        self._decided = 0
        self._was_text = True

    def add(self, token_id: int, logprob: TokenLogprob) -> None:
        if token_id in self._shown:
            self._come += len(self._length.decode(b"", True)) + len(self._shown[token_id])
        else:
            self._come += len(self._length.decode(self._bytes(token_id)))
        self._waiting.append((self._come, logprob))

    def take(self, spans: Iterable[Said | Unsaid], *, at_end: bool) -> list[TokenLogprob]:
        """The tokens of what was said. What nobody decided until the end goes with what was decided last."""
        spoken: list[TokenLogprob] = []
        for span in spans:
            self._decided += span.length
            self._was_text = isinstance(span, Said)
            spoken += self._until(self._decided)
        return [*spoken, *self._until(self._come)] if at_end else spoken

    def _until(self, place: int) -> list[TokenLogprob]:
        passed = []
        while self._waiting and self._waiting[0][0] <= place:
            passed.append(self._waiting.popleft()[1])
        return passed if self._was_text else []

    def _bytes(self, token_id: int) -> bytes:
        if self._begun or token_id in self._tokenizer.special_ids:
            return self._tokenizer.token_bytes(token_id)
        self._begun = True
        return self._tokenizer.opening_bytes(token_id)
