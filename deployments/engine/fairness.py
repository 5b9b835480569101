"""Who has had how much, and who is next: virtual token counters and shares of a step. Pure arithmetic; knows no sequence, no block.

VTC (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): each tenant has a counter of the service that it was
given, and the tenant with the smallest one is next. Who begins to wait is lifted to the least of those who wait already, so that
idling saves nothing up. Two tenants that both wait all the time so differ by at most twice what one admission or one full batch
can cost, whatever they send.

The same counters stand between the two classes of service, where a class pays by the inverse of its weight.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Generic, TypeVar

PROMPT = 1.0
"""Cost of a computed prompt token: the unit."""
OUTPUT = 2.0
"""Cost of an output token, as in the paper: prompts share the reading of the weights among many tokens of their own, output tokens
only with batch-mates."""
CACHED = 0.1
"""Cost of a prompt token from the prefix cache: nothing is computed, but its block is held and every later token attends to it."""
BATCH_PRICE = 19.0
"""What `batch` pays for what `interactive` gets for 1: it has a twentieth of a model that both could fill."""

Party = TypeVar("Party", bound="Account")
Key = TypeVar("Key", bound=Hashable)


def prompt_cost(num_tokens: int, num_cached: int) -> float:
    return PROMPT * (num_tokens - num_cached) + CACHED * num_cached


def batch_part(budget: int, interactive: int, batch: int) -> int:
    """Of a step's budget, what `batch` gets of the tokens that it wants: what `interactive` leaves, and at least its share."""
    return min(batch, max(budget - interactive, int(budget / (1 + BATCH_PRICE))))


def shares(budget: int, wanted: Mapping[Key, int]) -> dict[Key, int]:
    """Max-min fair: nobody gets more than it wants, nobody more than another who wants more still."""
    given, left = {}, len(wanted)
    for key, amount in sorted(wanted.items(), key=lambda item: item[1]):
        given[key] = min(amount, budget // left)
        budget -= given[key]
        left -= 1
    return given


@dataclass(slots=True, eq=False)
class Account:
    """What one party has been given: its virtual token counter. `price` is the inverse of its weight."""

    price: float = 1.0
    served: float = 0.0


class Ledger(Generic[Party]):
    """Those who share one thing, and who of them waits."""

    def __init__(self) -> None:
        self.floor = 0.0  # nobody begins to wait below it
        self._waiting: dict[Party, None] = {}  # in the order in which they began

    def begin(self, party: Party) -> None:
        """It waits from now on, with no greater claim than any of the others has."""
        self._raise_floor()
        party.served = max(party.served, self.floor)
        self._waiting[party] = None

    def resume(self, party: Party) -> None:
        """It waits again for what was taken from it, and so is not lifted."""
        self._waiting.setdefault(party)

    def end(self, party: Party) -> None:
        """Nothing of it waits any more."""
        self._waiting.pop(party, None)

    def choose(self) -> None:
        """One of them is about to be served: who begins to wait after this had no claim before."""
        self._raise_floor()

    def order(self) -> list[Party]:
        """Who waits, the greatest claim first; among equals who waits longest."""
        return sorted(self._waiting, key=attrgetter("served"))

    def first(self) -> Party:
        """Whose turn it is. Somebody must wait."""
        return min(self._waiting, key=attrgetter("served"))

    def is_level(self, party: Party) -> bool:
        """Whether it would be lifted when it came back: then nothing is lost by forgetting it."""
        return party.served <= self.floor

    def _raise_floor(self) -> None:
        if self._waiting:
            self.floor = max(self.floor, min(party.served for party in self._waiting))
