"""Which adapters are in which slots: a pure policy over numbers. No event loop, no file, no rank.

An adapter that anybody holds is never evicted; of the idle ones goes the one that was used longest ago. Who finds no room waits,
first come first served. That the first in the queue gets its turn however busy the resident ones are, some of them are marked to
leave: whoever asks for such a one now goes behind the queue, so its last holder comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Place:
    """A slot (from 1) with an adapter in it, or on the way into it."""

    key: str
    slot: int
    num_bytes: int
    holders: int = 0
    is_loaded: bool = False
    leaves: bool = False

    @property
    def is_idle(self) -> bool:
        return self.is_loaded and not self.holders


@dataclass(frozen=True, slots=True)
class Grant:
    """The first in the queue has a place; what had to go for it is to be dropped first. Nothing is to be loaded into an old one."""

    place: Place
    evicted: tuple[int, ...]
    is_new: bool


class Slots:
    """`count` slots that hold at most `max_bytes` together."""

    def __init__(self, count: int, max_bytes: int) -> None:
        self.count, self.max_bytes = count, max_bytes
        self._places: dict[str, Place] = {}  # the one that was used longest ago first
        self._queue: dict[str, int] = {}  # bytes of those that wait, in order

    @property
    def places(self) -> list[Place]:
        return list(self._places.values())

    def fits(self, num_bytes: int) -> bool:
        """Whether an adapter of this size could ever have a place."""
        return self.count > 0 and num_bytes <= self.max_bytes

    def ask(self, key: str, num_bytes: int) -> Place | None:
        """A place, held once more; None: the key waits now, and `grant` will tell."""
        assert self.fits(num_bytes), "larger than all slots together"
        place = self._places.get(key)
        if place is None or place.leaves or key in self._queue:
            self._queue.setdefault(key, num_bytes)
            return None
        self.hold(place)
        return place

    def hold(self, place: Place) -> None:
        place.holders += 1
        self._places[place.key] = self._places.pop(place.key)

    def release(self, place: Place) -> None:
        assert place.holders > 0, "released more often than held"
        place.holders -= 1

    def forget(self, key: str) -> None:
        """Nobody waits for it any more."""
        self._queue.pop(key, None)

    def loaded(self, place: Place) -> None:
        place.is_loaded = True

    def failed(self, place: Place) -> None:
        """It could not be loaded; its slot is empty. Those who hold it still release it."""
        if self._places.get(place.key) is place:
            del self._places[place.key]

    def grant(self) -> Grant | None:
        """A place for the first in the queue, if it can have one now. To be asked again after whatever changed."""
        for place in self._places.values():
            place.leaves = False
        if not self._queue:
            return None
        key, num_bytes = next(iter(self._queue.items()))
        if key in self._places:  # it was to leave, and stayed
            del self._queue[key]
            return Grant(self._places[key], (), is_new=False)
        leaving = list(self._leaving(num_bytes))
        if not all(place.is_idle for place in leaving):
            for place in leaving:
                place.leaves = True
            return None
        for place in leaving:
            del self._places[place.key]
        del self._queue[key]
        taken = {place.slot for place in self._places.values()}
        slot = next(slot for slot in range(1, self.count + 1) if slot not in taken)
        self._places[key] = Place(key, slot, num_bytes)
        return Grant(self._places[key], tuple(place.slot for place in leaving), is_new=True)

    def _leaving(self, num_bytes: int) -> Iterator[Place]:
        """Who must go for so many bytes: idle ones first, then those with the fewest holders."""
        count, room = len(self._places), self.max_bytes - sum(place.num_bytes for place in self._places.values())
        for place in sorted(self._places.values(), key=lambda place: (not place.is_idle, place.holders)):
            if count < self.count and room >= num_bytes:
                return
            yield place
            count -= 1
            room += place.num_bytes

    def check_integrity(self) -> None:
        """Raises AssertionError when a slot is taken twice, bytes or slots are exceeded, or a key both waits and could be had."""
        slots = [place.slot for place in self._places.values()]
        assert len(set(slots)) == len(slots) <= self.count, "a slot is taken twice"
        assert all(1 <= slot <= self.count for slot in slots), "a slot that isn't there"
        assert sum(place.num_bytes for place in self._places.values()) <= self.max_bytes, "more bytes than allowed"
        assert all(place.holders >= 0 for place in self._places.values()), "a negative count"
