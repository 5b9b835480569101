"""Compute seconds by request: the time of each step is split over the sequences that were in it. Pure arithmetic.

A step's time goes by the rows that it computed of each sequence, prompt or output: whoever had 100 of its 128 rows pays 100/128 of
it. Shares are whole microseconds that sum to the step exactly, so what is attributed can be reconciled with the time that replicas
were busy; what they were idle is nobody's, and is printed beside it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

MICROSECONDS = 1_000_000


def split(microseconds: int, rows: Mapping[Key, int]) -> dict[Key, int]:
    """Shares in proportion to `rows`, by the largest remainder; they sum to the whole. Nobody's rows: nobody's time."""
    total = sum(rows.values())
    if not total:
        return dict.fromkeys(rows, 0)
    shares = {key: microseconds * count // total for key, count in rows.items()}
    by_remainder = sorted(rows, key=lambda key: -(microseconds * rows[key] % total))  # stable: equal ones in their order
    for key in by_remainder[: microseconds - sum(shares.values())]:
        shares[key] += 1
    return shares


@dataclass(slots=True)
class ComputeMeter(Generic[Key]):
    """What one replica's steps have cost each open sequence. Fractions of microseconds are carried to the next step, so that many
    short steps lose nothing."""

    busy: int = 0  # microseconds that were attributed
    _owed: float = 0.0
    _open: dict[Key, int] = field(default_factory=dict)

    def step(self, seconds: float, rows: Mapping[Key, int]) -> None:
        """One step that took `seconds`."""
        if not any(rows.values()):
            return
        whole = self._owed + seconds * MICROSECONDS
        microseconds = int(whole)
        self._owed = whole - microseconds
        self.busy += microseconds
        for key, share in split(microseconds, rows).items():
            self._open[key] = self._open.get(key, 0) + share

    def so_far(self, key: Key) -> int:
        """Microseconds of a sequence that still runs."""
        return self._open.get(key, 0)

    def close(self, key: Key) -> int:
        """Microseconds of a sequence that has ended."""
        return self._open.pop(key, 0)


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """Seconds. `attributed` to requests and `idle` should come to `held`, the time that replicas existed."""

    held: float
    busy: float
    attributed: float

    @property
    def idle(self) -> float:
        return self.held - self.busy

    @property
    def error(self) -> float:
        """Share of the busy time that is nobody's, or was given out twice (negative)."""
        return (self.busy - self.attributed) / self.busy if self.busy else 0.0

    def __str__(self) -> str:
        shares = f"attributed {self.attributed:.3f} s of {self.busy:.3f} s busy (error {self.error:+.4%})"
        return f"{shares}, idle {self.idle:.3f} s of {self.held:.3f} s"
