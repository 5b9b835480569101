"""Guesses for a sequence that is held to a form: the tokens that its grammar leaves no choice about.

The grammar forces bytes, not tokens: the guess is how the tokenizer itself would write them, and a model may cut them otherwise.
So these guesses are scored like any others. Where nothing is forced, prompt lookup guesses, up to what the form forbids.
"""

from __future__ import annotations

from deployments.engine.draft import SURE, Drafter
from deployments.engine.sequence import Sequence

DOUBTFUL = 0.5
"""A habit below is asked about in every eighth step alone: what is forced costs as much to find out as a small model's row."""
RARELY = 8


class Habit:
    """How often forced tokens came as the tokenizer writes them, of all sequences together. Begins undecided."""

    def __init__(self) -> None:
        self.share = 0.5

    def add(self, right: bool) -> None:
        self.share += (right - self.share) / 64


class ForcedDrafter:
    """Guesses at most `limit` tokens. Learns which were right, whether anybody used them or not."""

    def __init__(self, sequence: Sequence, lookup: Drafter, habit: Habit, limit: int) -> None:
        self._sequence = sequence
        self._lookup = lookup
        self._habit = habit
        self._limit = limit
        self._forced: list[int] = []
        self._seen = len(sequence.tokens)  # tokens when these were forced
        self._steps = 0

    def chance(self) -> float:
        """How likely the first guessed token is right, 0.0 without a guess."""
        self._settle()
        found, matcher = self._lookup.chance(), self._sequence.matcher
        self._steps += 1
        asks = self._habit.share >= DOUBTFUL or self._steps % RARELY == 0
        self._forced = matcher.forced(self._limit) if matcher and asks else []
        self._seen = len(self._sequence.tokens)
        return min(self._habit.share, SURE) if self._forced else found

    def draft(self, count: int) -> list[int]:
        """As many guesses, or fewer: they follow the tokens of the last call of `chance`."""
        if self._forced:
            return self._forced[:count]
        guesses, matcher = self._lookup.draft(count), self._sequence.matcher
        return guesses[: matcher.fitting(guesses)] if matcher else guesses

    def _settle(self) -> None:
        """Compare with what came. Behind the first wrong token a guess says nothing."""
        for token, guess in zip(self._sequence.tokens[self._seen :], self._forced, strict=False):
            self._habit.add(token == guess)
            if token != guess:
                return
