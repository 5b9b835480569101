"""Where a rank stands when a model is cut both ways: layers into stages, a stage's tensors into parts. Numbers in, numbers out.

Ranks count from the end of the model: the first `tp` of them hold the last stage. So the leader, rank 0, has the logits that it
samples from, and none of them travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import add

import numpy as np


@dataclass(frozen=True, slots=True)
class Place:
    """One of `tp` x `pp` ranks. The default is a rank that is alone."""

    rank: int = 0
    tp: int = 1
    pp: int = 1

    @property
    def stage(self) -> int:
        """0 has the embeddings, `pp - 1` the head."""
        return self.pp - 1 - self.rank // self.tp

    @property
    def part(self) -> int:
        """Which of its stage's tensor parts it holds."""
        return self.rank % self.tp

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.pp - 1

    @property
    def peers(self) -> range:
        """The ranks of its stage."""
        first = self.rank - self.part
        return range(first, first + self.tp)

    @property
    def before(self) -> int:
        """The rank that it gets hidden states from."""
        return self.rank + self.tp

    @property
    def behind(self) -> int:
        """The rank that it gives them to."""
        return self.rank - self.tp


def split(layers: Sequence[int], pp: int, *, before: int = 0, behind: int = 0) -> tuple[range, ...]:
    """Each stage's run of layers, none empty, so that the heaviest stage is as light as can be, and the rest as even as that
    allows. `layers` are weights; so are `before` and `behind`, which the first and the last stage have besides."""
    if not 1 <= pp <= len(layers):
        raise ValueError(f"{len(layers)} layers can't be cut into {pp} stages")
    weights = np.concatenate([[0.0], np.cumsum(layers)])
    runs = [weights[None, :] - weights[:, None] for _ in range(pp)]  # of each stage: what layers i to j weigh
    runs[0] = runs[0] + before
    runs[-1] = runs[-1] + behind
    nothing = np.tri(len(weights), dtype=bool)
    runs = [np.where(nothing, np.inf, run) for run in runs]
    heaviest, _ = _best(runs, np.maximum)
    ends = _best([np.where(run <= heaviest, run**2, np.inf) for run in runs], add)[1]
    return tuple(range(first, last) for first, last in pairwise(ends))


def _best(runs: Sequence[np.ndarray[tuple[int, int], np.dtype[np.float64]]], together: object) -> tuple[float, list[int]]:
    """The least that runs one after the other can come `together` to, over all layers, and the layers between them."""
    best = runs[0][0]
    choices = []
    for run in runs[1:]:
        reached = together(best[:, None], run)  # type: ignore[operator]
        choices.append(reached.argmin(0))
        best = reached.min(0)
    ends = [len(best) - 1]
    for choice in reversed(choices):
        ends.append(int(choice[ends[-1]]))
    return float(best[-1]), [0, *reversed(ends)]
