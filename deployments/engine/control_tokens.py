"""Tokens with a meaning for the model (end of turn, start of a role): found in text, and told from text that only looks like them.

Somebody who types `<|im_end|>` must not end a turn. Text is defused by a break inside of every such occurrence; the tokenizer takes
the breaks out again after it has looked for control tokens and before it forms the others. Knows nothing of templates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from cluster.errors import InvalidRequest

BREAK = "\ufdd0"
"""A Unicode noncharacter, which never occurs in text meant for exchange; a caller's own is dropped."""


class ControlTokens:
    def __init__(self, tokens: Iterable[str]) -> None:
        self._tokens = frozenset(token for token in tokens if token)
        longest_first = sorted(self._tokens, key=len, reverse=True)
        any_token = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._token = re.compile(any_token)
        self._first_character = re.compile(f"(?=(?:{any_token}))(.)", re.DOTALL)

    def __contains__(self, token: object) -> bool:
        return token in self._tokens

    def __or__(self, other: ControlTokens) -> ControlTokens:
        return ControlTokens(self._tokens | other._tokens)

    def find(self, text: str) -> list[str]:
        """The control tokens that a tokenizer sees in `text`, from left to right."""
        return self._token.findall(text)

    def defuse(self, text: str) -> str:
        """`text` with a break in every control token, overlapping ones included. Raises InvalidRequest for a control token of one
        character, which can't be broken."""
        text = self._first_character.sub(rf"\1{BREAK}", text.replace(BREAK, ""))
        if found := self._token.search(text):
            raise InvalidRequest(f"{found[0]!r} is a control token of this model and can't be part of a text")
        return text


def isolate(text: str) -> str:
    """`text` with a break around every character: whatever happens to it later, no control token can come out of it."""
    return BREAK.join(["", *text.replace(BREAK, ""), ""]) if text else ""
