"""What one request used, by meter, and how it ended. Quantities are whole numbers in a meter's smallest unit."""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Literal

from cluster.types import Usage

Outcome = Literal["finished", "length", "cancelled", "client_gone", "replica_lost", "failed", "lost"]
"""How a request ended. `cancelled`: by a call; `client_gone`: the caller hung up; `failed`: refused or broken by the platform;
`lost`: whoever worked on it is gone, and the reaper closed it at the last progress that was durable."""

Service = Literal["completions", "embeddings", "rerank", "classify", "infer"]
"""What was asked for: the `operation` of reservations and usage records. A chat is a completion."""

OURS = frozenset({"replica_lost", "failed", "lost"})
"""Ends that no caller has to answer for: without any output they cost nothing."""


@dataclass(frozen=True, slots=True)
class Meter:
    """`scale` smallest units are one of what prices speak of: a compute second is counted in microseconds."""

    unit: str
    scale: int = 1


METERS: dict[str, Meter] = {
    "requests": Meter("Requests"),
    "input_tokens": Meter("Tokens"),
    "cached_tokens": Meter("Tokens"),
    "output_tokens": Meter("Tokens"),
    "replayed_tokens": Meter("Tokens"),
    "compute_seconds": Meter("Seconds", 1_000_000),
    "traded_volume": Meter("Units", 1_000_000),
}


_quantities = attrgetter(*METERS)  # `dataclasses.astuple` copies every value, deeply


@dataclass(frozen=True, slots=True)
class Metered:
    """One field for each of `METERS`. Input tokens that the prefix cache gave are `cached_tokens` and not `input_tokens`; those of
    an answer that the response cache gave, prompt and all, are `replayed_tokens`; `compute_seconds` are microseconds, and
    `traded_volume` are micro-units of the currency."""

    requests: int = 1
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    replayed_tokens: int = 0
    compute_seconds: int = 0
    traded_volume: int = 0

    def __post_init__(self) -> None:
        if any(type(quantity) is not int or quantity < 0 for quantity in _quantities(self)):
            raise ValueError(f"quantities are whole numbers from 0 on: {self}")

    @classmethod
    def of(cls, usage: Usage | Metered | None) -> Metered:
        """None: `NOTHING`."""
        if isinstance(usage, Metered):
            return usage
        if usage is None:
            return NOTHING
        if usage.from_cache:
            return cls(replayed_tokens=usage.total_tokens)
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        return cls(
            input_tokens=usage.prompt_tokens - cached,
            cached_tokens=cached,
            output_tokens=usage.completion_tokens,
            compute_seconds=usage.compute_us,
        )

    def items(self) -> list[tuple[str, int]]:
        """Meter and quantity, those that are not zero."""
        return [(name, quantity) for name in METERS if (quantity := getattr(self, name))]

    def at_least(self, other: Metered) -> Metered:
        """The greater of each: progress never goes back, however reports overtake each other."""
        return Metered(*map(max, _quantities(self), _quantities(other)))


def billable(metered: Metered, outcome: Outcome) -> Metered:
    """What of it is charged: all, but nothing where the platform failed before it had answered anything."""
    return Metered(requests=0) if outcome in OURS and not metered.output_tokens else metered


NOTHING = Metered()
"""A request of which nothing is known but that it was made."""

assert tuple(METERS) == tuple(field.name for field in fields(Metered))
