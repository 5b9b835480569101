"""What a rank is doing, told while it does it: read from another thread, judged by whoever watches the group.

A rank that works advances: its steps, its part of the ranks' talk, the layers of a step, the bytes of a load. One whose numbers
stand still is stuck, or waits for one that is; all wait for the one that has come least far in the talk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["loading", "waiting", "computing", "obeying an order"]


@dataclass(frozen=True, slots=True)
class Doing:
    """A moment of one rank. `talk`: how many times it has begun to send, receive or sum; `ticks`: anything that counts work."""

    rank: int
    phase: Phase
    step: int
    talk: int
    ticks: float


@dataclass(slots=True)
class StepClock:
    """Kept by the rank's own loop: a few assignments a step."""

    phase: Phase = "loading"
    step: int = 0

    def computes(self) -> None:
        self.phase = "computing"
        self.step += 1

    def waits(self) -> None:
        self.phase = "waiting"

    def obeys(self) -> None:
        self.phase = "obeying an order"


@dataclass(slots=True)
class Watch:
    """Sees the ranks' moments as they are asked for, and knows for how long each has stood still. `clock` in seconds."""

    size: int
    clock: Callable[[], float] = time.monotonic
    _seen: dict[int, Doing] = field(default_factory=dict)
    _since: dict[int, float] = field(default_factory=dict)
    _silent: set[int] = field(default_factory=set)

    def saw(self, moments: Sequence[Doing | None], silence_s: float = 0.0) -> None:
        """By rank; None for one that didn't answer. Who is seen for the first time has stood still for `silence_s` already."""
        now = self.clock()
        for rank, moment in enumerate(moments):
            if rank not in self._since and moment:
                self._seen[rank] = moment
            self._since.setdefault(rank, now - silence_s)
            self._silent.discard(rank)
            if moment is None:
                self._silent.add(rank)
            elif moment != self._seen.get(rank):
                self._seen[rank], self._since[rank] = moment, now

    def forget(self) -> None:
        """The group was well meanwhile."""
        self._seen.clear()
        self._since.clear()
        self._silent.clear()

    def stuck(self, deadline_s: float) -> str | None:
        """Who holds the group up and since when, once nobody has advanced, or one hasn't answered, for so long; None before."""
        if len(self._since) < self.size:
            return None
        still = {rank: self.clock() - since for rank, since in self._since.items()}
        silent = [rank for rank in sorted(self._silent) if still[rank] >= deadline_s]
        if silent:
            return f"rank {silent[0]} doesn't answer {self._where(silent[0])} for {still[silent[0]]:.0f} s"
        if min(still.values()) < deadline_s:
            return None
        rank = min(self._seen, key=lambda rank: (self._seen[rank].talk, self._seen[rank].phase == "waiting", rank), default=None)
        if rank is None:
            return f"no rank answers for {min(still.values()):.0f} s"
        return f"rank {rank} has been {self._where(rank)} for {still[rank]:.0f} s, {self._seen[rank].phase}"

    def _where(self, rank: int) -> str:
        """A stopped rank never says which step it is in; the others are in the same."""
        steps = [moment.step for moment in self._seen.values()]
        step = self._seen[rank].step if rank in self._seen and rank not in self._silent else max(steps, default=None)
        return "in a step" if step is None else f"in step {step}"
