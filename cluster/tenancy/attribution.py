"""Compute seconds by request: the time of each step is split over the sequences that were in it. Pure arithmetic.

A step's time goes by the rows that it computed of each sequence, prompt, output or guess: whoever had 100 of its 128 rows pays
100/128 of it. Shares are whole microseconds that sum to the step exactly, so what is attributed can be reconciled with the time
that replicas were busy; what they were idle is nobody's, and is printed beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import sub

MICROSECONDS = 1_000_000


def split(microseconds: int, rows: Sequence[int]) -> list[int]:
    """Shares in proportion to `rows`, which has at least one; each less than a microsecond off, all together exact."""
    total = sum(rows)
    ends = [microseconds * count // total for count in accumulate(rows)]
    return list(map(sub, ends, [0, *ends]))


@dataclass(slots=True)
class ComputeMeter:
    """Splits the steps of one replica. Fractions of microseconds are carried to the next step, so that many short steps lose
    nothing."""

    attributed: int = 0  # microseconds that somebody got
    _owed: float = 0.0

    def step(self, seconds: float, rows: Sequence[int]) -> list[int]:
        """Each one's microseconds of a step that took `seconds`. Without any row it is nobody's time."""
        if not any(rows):
            return [0] * len(rows)
        whole = self._owed + seconds * MICROSECONDS
        microseconds = int(whole)
        self._owed = whole - microseconds
        self.attributed += microseconds
        return split(microseconds, rows)


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """Seconds. Of the time that replicas were `held` they were `busy` in steps; that was `attributed` to requests, and these are
    `billed` when they end."""

    held: float
    busy: float
    attributed: float
    billed: float

    @property
    def idle(self) -> float:
        return self.held - self.busy

    @property
    def error(self) -> float:
        """Share of the busy time that is on no bill, or there twice (negative)."""
        return (self.busy - self.billed) / self.busy if self.busy else 0.0
