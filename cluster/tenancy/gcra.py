"""How much may be spent now: the generic cell rate algorithm in its leaky-bucket form (ITU-T I.371, annex A), as pure functions.

A bucket holds what was spent and leaks `limit` units a minute; more than `burst` never fits. So in any window no more is spent than
`burst` and what leaks in it. Everything is an integer, units times the microseconds of a minute: nothing is rounded, and a changed
limit needs no conversion. Of time only differences count: a clock that jumps forward empties the bucket, which gives at most one
burst, and one that jumps back loses nothing but the time since the last call.
"""

from __future__ import annotations

from dataclasses import dataclass

MINUTE_US = 60_000_000
NEVER_US = 1 << 62
"""A wait that doesn't end."""


@dataclass(frozen=True, slots=True)
class Rate:
    limit: int  # units a minute
    burst: int  # units at once, after a pause

    def leaked(self, elapsed_us: int) -> int:
        return max(0, elapsed_us) * self.limit


@dataclass(frozen=True, slots=True)
class Bucket:
    """`debt`: what was spent and has not leaked yet, times `MINUTE_US`. It was so at `at` microseconds of some clock."""

    debt: int = 0
    at: int = 0


EMPTY = Bucket()


def wait_us(rate: Rate, bucket: Bucket, now: int, units: int) -> int:
    """How long until `units` may be spent, if nobody else spends: 0 now, NEVER_US when they are more than the burst."""
    excess = _debt(rate, bucket, now) + (units - rate.burst) * MINUTE_US
    if excess <= 0:
        return 0
    if units > rate.burst or rate.limit == 0:
        return NEVER_US
    return -(-excess // rate.limit)


def spend(rate: Rate, bucket: Bucket, now: int, units: int) -> Bucket:
    """The bucket after `units`, whether they may be spent or not; negative ones are given back, down to an empty bucket."""
    return Bucket(max(0, _debt(rate, bucket, now) + units * MINUTE_US), now)


def room(rate: Rate, bucket: Bucket, now: int) -> int:
    """Units that may be spent now."""
    return max(0, rate.burst - -(-_debt(rate, bucket, now) // MINUTE_US))


def empty_in_us(rate: Rate, bucket: Bucket, now: int) -> int:
    """How long until the whole burst may be spent."""
    debt = _debt(rate, bucket, now)
    return 0 if debt == 0 else NEVER_US if rate.limit == 0 else -(-debt // rate.limit)


def _debt(rate: Rate, bucket: Bucket, now: int) -> int:
    return max(0, bucket.debt - rate.leaked(now - bucket.at))
