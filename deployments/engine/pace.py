"""When a stream sends: its first news and its last at once, what comes between gathered. Pure: time comes in as a number.

Every item that leaves the replica wakes three processes up to the caller, and that costs as much for one token as for ten. Time is
cut into slots that are the same for all streams, and in each a stream sends once at most, as soon as it has something. So a model
that is slower than the slots streams token by token, and the items of many streams leave together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")

ITEMS_PER_S = 250.0
"""Items that all streams of a replica together send in a second, while slots don't get longer than `LONGEST_S` for it."""

LONGEST_S = 0.1
"""Longest slot, however many streams there are: more often than a reader looks."""


def slot_s(interval_s: float, num_streams: int) -> float:
    """Length of a slot: `interval_s`, longer with many streams, 0 for no gathering at all."""
    return max(interval_s, min(LONGEST_S, num_streams / ITEMS_PER_S)) if interval_s else 0.0


@dataclass(slots=True)
class Gathered(Generic[Item]):
    """What has come of one stream and isn't sent yet."""

    items: list[Item] = field(default_factory=list)
    due_s: float = math.inf  # the time from which `items` should go
    _sent_s: float = -math.inf

    def add(self, items: list[Item], *, now_s: float, slot_s: float, urgent: bool) -> None:
        """`urgent` items, and all before them, are due at once."""
        self.items += items
        self.due_s = now_s if urgent else min(self.due_s, self._next_slot_s(now_s, slot_s))

    def take(self, now_s: float) -> list[Item]:
        """Everything gathered. The next item waits for another slot."""
        items, self.items = self.items, []
        self.due_s, self._sent_s = math.inf, now_s
        return items

    def _next_slot_s(self, now_s: float, slot_s: float) -> float:
        """The start of the first slot after that of the last item, or now if it has begun."""
        if slot_s == 0.0 or self._sent_s == -math.inf:
            return now_s
        return max(now_s, (math.floor(self._sent_s / slot_s) + 1) * slot_s)
