"""A policy of guessing that knows the answers and lies now and then: it reaches what prompt lookup rarely does."""

from __future__ import annotations

import random
from collections.abc import Mapping
from collections.abc import Sequence as Items

from deployments.engine.scheduler import Slice
from deployments.engine.speculation import Speculation

Answers = Mapping[tuple[int, int], Items[int]]
"""The right output by request and choice."""


class Guesses(Speculation):
    """Drafts of random length for every slice that samples, the end of a prompt included; `lies` is the share of wrong tokens."""

    def __init__(self, answers: Answers, *, limit: int = 6, lies: float = 0.2, seed: int = 0, vocabulary: int = 12) -> None:
        super().__init__(limit)
        self.answers = answers
        self.lies = lies
        self.vocabulary = vocabulary
        self.random = random.Random(seed)

    def drafts(self, slices: Items[Slice]) -> list[list[int]]:
        return [self._draft(item) if item.samples else [] for item in slices]

    def _draft(self, item: Slice) -> list[int]:
        sequence = item.sequence
        ahead = self.answers[sequence.request_id, sequence.index][sequence.num_output :]
        room = sequence.max_tokens - sequence.num_output - 1
        draft = [*ahead, 0, 1, 2, 3][: min(room, self.random.randint(0, self.limit))]
        return [self.random.randrange(self.vocabulary) if self.random.random() < self.lies else token for token in draft]
