"""What limits are counted with: one interface, in this process's memory alone or shared with other gateways (`shares.py`)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cluster.tenancy import gcra
from cluster.tenancy.gcra import EMPTY, Bucket, Rate

Kind = Literal["requests", "tokens", "streams"]

STREAM_WAIT_US = 1_000_000
"""Nobody knows when a stream ends: come back in a second."""

SWEEP = 8192
"""Buckets in memory at which the empty ones are forgotten."""


@dataclass(frozen=True, slots=True)
class Want:
    """`units` of what the bucket `name` allows: `limit` a minute, or at once for streams."""

    kind: Kind
    name: str
    limit: int
    units: int = 1


@dataclass(frozen=True, slots=True)
class Level:
    remaining: int
    reset_us: int  # until nothing of it is used


class Counts(Protocol):
    """Between `prepare` and `spend` nothing may be awaited, so that what was free still is."""

    def burst(self, kind: Kind, limit: int) -> int:
        """The most units of such a limit that can be had at once."""
        ...

    async def prepare(self, wants: Sequence[Want]) -> None:
        """Get ready to answer about these. Raises PlatformError when that can't be."""
        ...

    def wait_us(self, want: Want) -> int:
        """How long until it may be spent: 0 now, `gcra.NEVER_US` never."""
        ...

    def spend(self, want: Want) -> None: ...

    def give(self, want: Want, units: int) -> None:
        """Take `units` back from what was spent; negative ones were spent beyond."""
        ...

    def level(self, want: Want) -> Level: ...


class Meters:
    """Exact counts for the only gateway there is. A new process starts with nothing used."""

    def __init__(self, clock_us: Callable[[], int] = lambda: time.monotonic_ns() // 1000) -> None:
        self._clock = clock_us
        self._buckets: dict[str, Bucket] = {}
        self._streams: Counter[str] = Counter()

    def burst(self, kind: Kind, limit: int) -> int:
        return limit

    async def prepare(self, wants: Sequence[Want]) -> None:
        if len(self._buckets) > SWEEP:
            self._sweep()

    def wait_us(self, want: Want) -> int:
        if want.kind == "streams":
            return 0 if self._streams[want.name] + want.units <= want.limit else STREAM_WAIT_US
        return gcra.wait_us(_rate(want), self._bucket(want), self._clock(), want.units)

    def spend(self, want: Want) -> None:
        self._add(want, want.units)

    def give(self, want: Want, units: int) -> None:
        self._add(want, -units)

    def level(self, want: Want) -> Level:
        if want.kind == "streams":
            return Level(max(0, want.limit - self._streams[want.name]), 0)
        rate, bucket, now = _rate(want), self._bucket(want), self._clock()
        return Level(gcra.room(rate, bucket, now), gcra.empty_in_us(rate, bucket, now))

    def _add(self, want: Want, units: int) -> None:
        if want.kind == "streams":
            self._streams[want.name] += units
            if not self._streams[want.name]:
                del self._streams[want.name]
        else:
            self._buckets[want.name] = gcra.spend(_rate(want), self._bucket(want), self._clock(), units)

    def _bucket(self, want: Want) -> Bucket:
        return self._buckets.get(want.name, EMPTY)

    def _sweep(self) -> None:
        """Forget what was not touched for longer than any bucket of a sane limit takes to empty."""
        old = self._clock() - 10 * gcra.MINUTE_US
        self._buckets = {name: bucket for name, bucket in self._buckets.items() if bucket.debt and bucket.at > old}


def _rate(want: Want) -> Rate:
    return Rate(want.limit, want.limit)
