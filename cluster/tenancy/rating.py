"""Rating: from what was metered to what it costs. A pure function of prices, counters and usage, so that it can be replayed.

Counters hold how much of each charge's meter a window has seen. Whoever rates keeps them: the ledger in its tables, a replay in a
dictionary. Requests are rated in the order in which they were booked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from decimal import Decimal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from cluster.tenancy import periods
from cluster.tenancy.charges import Charge, Price
from cluster.tenancy.metered import Metered
from cluster.tenancy.money import CURRENCY

Counter = tuple[str, int]
"""A charge's key and the label of its window."""


class PriceList(BaseModel):
    """One version of a plan's prices. `fee` is owed for every month, `minimum` is the least that a month's invoice comes to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    currency: str = "EUR"
    charges: tuple[Charge, ...] = Field(default=(), max_length=1000)
    fee: Price = Decimal(0)
    minimum: Price = Decimal(0)

    @field_validator("currency")
    @classmethod
    def _known(cls, value: str) -> str:
        if CURRENCY.match(value) is None:
            raise ValueError("a currency has three capital letters")
        return value

    @field_validator("charges")
    @classmethod
    def _unique(cls, value: tuple[Charge, ...]) -> tuple[Charge, ...]:
        if len({charge.key for charge in value}) < len(value):
            raise ValueError("two charges are for the same meter and model")
        return value

    def charge(self, model: str, meter: str) -> Charge | None:
        """The one that applies: the model's own, that of its base (`BASE:NAME` is an adapter's), or the one for all."""
        found = {charge.model: charge for charge in self.charges if charge.meter == meter}
        return found.get(model) or found.get(model.partition(":")[0]) or found.get("*")


@dataclass(frozen=True, slots=True)
class Item:
    """What one meter of one request costs: micro-units for `quantity` smallest units. `counter` is what it counts against."""

    model: str
    meter: str
    quantity: int
    amount: int
    counter: Counter


def chargeable(prices: PriceList, model: str, metered: Metered) -> Iterator[tuple[Charge, int]]:
    """Charges that apply, with their quantities. Cached input without a price of its own is input like any other."""
    if prices.charge(model, "cached_tokens") is None:
        metered = replace(metered, input_tokens=metered.input_tokens + metered.cached_tokens, cached_tokens=0)
    for meter, quantity in metered.items():
        if charge := prices.charge(model, meter):
            yield charge, quantity


def rate(prices: PriceList, counters: Mapping[Counter, int], model: str, metered: Metered, at: float) -> list[Item]:
    """What a request costs that is booked at `at`, seconds since the epoch."""
    items = []
    for charge, quantity in chargeable(prices, model, metered):
        counter = charge.key, periods.label(charge.window, at)
        before = counters.get(counter, 0)
        items.append(Item(model, charge.meter, quantity, charge.cost(before + quantity) - charge.cost(before), counter))
    return items


def count(counters: MutableMapping[Counter, int], items: Iterable[Item]) -> None:
    """Move the counters past a rated request."""
    for item in items:
        counters[item.counter] = counters.get(item.counter, 0) + item.quantity


def at_most(prices: PriceList, model: str, bound: Metered) -> int:
    """Micro-units that a request of at most these quantities can't pass: what is reserved before any work."""
    prompt = bound.input_tokens + bound.cached_tokens
    rest = replace(bound, input_tokens=0, cached_tokens=0)
    owed = sum(charge.at_most(quantity) for charge, quantity in chargeable(prices, model, rest))
    fresh, cached = prices.charge(model, "input_tokens"), prices.charge(model, "cached_tokens")
    sides = [charge.at_most(prompt) for charge in (fresh, cached) if charge]
    if any(charge.package for charge in (fresh, cached) if charge):
        return owed + sum(sides)
    return owed + max(sides, default=0) + (len(sides) > 1 and prompt > 0)  # rounding: the prompt may be divided among both


@dataclass(frozen=True, slots=True)
class Booked:
    """A settled request as the ledger keeps it: all that rating needs."""

    price: int
    model: str
    metered: Metered
    booked_at: float


def replay(requests: Iterable[Booked], prices: Mapping[int, PriceList]) -> Iterator[list[Item]]:
    """Rate one organization's settled requests again, in the order of their booking."""
    counters: dict[Counter, int] = {}
    for request in requests:
        items = rate(prices[request.price], counters, request.model, request.metered, request.booked_at)
        count(counters, items)
        yield items
