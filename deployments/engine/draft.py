"""Guesses how a sequence goes on by looking up where its last tokens stood before (prompt lookup: Saxena 2023; in transformers
and vLLM under the same name). Knows tokens only: no model, no clock, no batch.

The index is that of LZ77 (Ziv and Lempel 1977): a table from each pair of tokens to its newest place, and from each place a link
to the one before with the same pair. So a new token costs O(1), a lookup visits a bounded number of places, and a copy may run
into itself: after `a b a b` comes `a b a b ...`, as far as one likes.
"""

from __future__ import annotations

from array import array

LONGEST = 8
"""Tokens of a match that are compared at most; a longer one tells nothing more."""
PLACES = 16
"""Earlier places of the last pair that are looked at, newest first."""
DECAY = 1 - 1 / 16
"""What a guess counts for, compared with the next one of the same length."""
TRUST = 4.0
"""Guesses of its own after which a sequence is believed as much as all others together."""
SURE = 0.97
"""No guess counts as certain."""


class Experience:
    """How often guesses were right, by the length of the match they followed: of all sequences together. Begins undecided."""

    def __init__(self) -> None:
        self.shares = [0.5] * (LONGEST + 1)

    def add(self, length: int, right: bool) -> None:
        self.shares[length] += (right - self.shares[length]) / 64


class Drafter:
    """Guesses for one sequence. Reads `tokens`, which its owner appends to, and learns by itself which of its guesses were right,
    whether anybody used them or not. About 130 bytes a token."""

    def __init__(self, tokens: list[int], common: Experience) -> None:
        self._tokens = tokens
        self._common = common
        self._newest: dict[int, int] = {}  # where a pair of tokens ended last
        self._links = array("i", (0, 0))  # for each end of a pair the one before it; 0: there is none
        self._tried = [0.0] * (LONGEST + 1)  # guesses by the match's length, older ones count for less
        self._right = [0.0] * (LONGEST + 1)  # of these
        self._length = 0  # of the newest match; 0: no match
        self._source = 0  # what follows it: the guess
        self._seen = len(tokens)  # tokens at that time

    def chance(self) -> float:
        """How likely the first guessed token is right, 0.0 without a guess. Takes in the tokens that came since the last call."""
        self._settle()
        self._index()
        self._seen = len(self._tokens)
        self._length, self._source = self._match()
        return self._chance(self._length) if self._length else 0.0

    def draft(self, count: int) -> list[int]:
        """`count` guessed tokens, or none without a match. They follow the tokens of the last call of `chance`."""
        if not self._length:
            return []
        period = self._seen - self._source
        return [self._tokens[self._source + place % period] for place in range(count)]

    def _settle(self) -> None:
        """Compare the last guess with what came. Behind the first wrong token a guess says nothing."""
        came, length = self._tokens[self._seen :], self._length
        for token, guess in zip(came, self.draft(len(came)), strict=False):
            right = token == guess
            self._common.add(length, right)
            self._tried[length] = self._tried[length] * DECAY + 1
            self._right[length] = self._right[length] * DECAY + right
            if not right:
                return

    def _chance(self, length: int) -> float:
        share = (self._right[length] + TRUST * self._common.shares[length]) / (self._tried[length] + TRUST)
        return min(share, SURE)

    def _index(self) -> None:
        tokens, newest, links = self._tokens, self._newest, self._links
        for end in range(len(links), len(tokens) + 1):
            pair = tokens[end - 2] << 32 | tokens[end - 1]
            links.append(newest.get(pair, 0))
            newest[pair] = end

    def _match(self) -> tuple[int, int]:
        """Length and end of the longest run of tokens that is also the sequence's end; of equals the newest."""
        tokens, size = self._tokens, len(self._tokens)
        best, source = 0, 0
        place = self._links[size]
        for _ in range(PLACES):
            if not place or best == LONGEST:
                break
            length = 2
            while length < min(place, LONGEST) and tokens[place - 1 - length] == tokens[size - 1 - length]:
                length += 1
            if length > best:
                best, source = length, place
            place = self._links[place]
        return best, source
