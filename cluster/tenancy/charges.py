"""Charge models: what a quantity costs in a window. Pure; knows neither requests nor tenants.

Every model is one function, from the quantity used so far in the window to the amount owed for it. What one request costs is the
difference that it makes. So amounts of requests add up to the rounded whole exactly, whatever their number and order.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cluster.tenancy import money
from cluster.tenancy.metered import METERS
from cluster.tenancy.periods import Window

_E12 = 10**12  # prices have at most twelve digits behind the point


def _no_float(value: Any) -> Any:
    if isinstance(value, float):
        raise ValueError('write a price as text: "0.15"')
    return value


Price = Annotated[Decimal, BeforeValidator(_no_float), Field(ge=0, max_digits=21, decimal_places=12, allow_inf_nan=False)]
"""In units of the currency."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Tier(_Part):
    """`price` for each unit up to the `up_to`-th of the window; none: for all that follow."""

    up_to: int | None = Field(default=None, gt=0)
    price: Price


class Package(_Part):
    """`price` for each `size` units that were begun."""

    size: int = Field(gt=0)
    price: Price


class Charge(_Part):
    """What the units of one meter cost: `tiers`, each unit at its own tier's price, or a `package`; `price` is short for one tier.

    `model` is a served model's name or `*`; `per` is how many units a price is for.
    """

    meter: str
    model: str = "*"
    window: Window = "month"
    per: int = 1
    price: Price | None = None
    tiers: tuple[Tier, ...] = ()
    package: Package | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.meter not in METERS:
            raise ValueError(f"there is no meter {self.meter!r}; there are {', '.join(METERS)}")
        if self.per not in (1, 1000, 1_000_000):
            raise ValueError("per is 1, 1000 or 1000000")
        if sum((self.price is not None, bool(self.tiers), self.package is not None)) != 1:
            raise ValueError(f"{self.meter}: give one of price, tiers and package")
        bounds = [tier.up_to for tier in self.tiers]
        if self.tiers and (bounds[-1] is not None or None in bounds[:-1] or bounds[:-1] != sorted({b for b in bounds if b})):
            raise ValueError(f"{self.meter}: tiers rise, and the last one has no up_to")
        if self.package and self.per != 1:
            raise ValueError("a package has its own size: leave per out")
        return self

    @property
    def key(self) -> str:
        """What the counter of its units is named by."""
        return f"{self.model}|{self.meter}|{self.window}"

    @property
    def steps(self) -> tuple[Tier, ...]:
        """Its tiers, a plain price being one."""
        return self.tiers or ((Tier(price=self.price),) if self.price is not None else ())

    def cost(self, quantity: int) -> int:
        """Micro-units for a window's first `quantity` smallest units; never less for more of them."""
        scale = METERS[self.meter].scale
        if self.package:
            return money.divide_up(quantity, self.package.size * scale) * _micro(self.package.price)
        owed, below = 0, 0
        for tier in self.steps:
            upper = quantity if tier.up_to is None else min(quantity, tier.up_to * scale)
            owed += max(0, upper - below) * int(tier.price * _E12)
            below = max(below, upper)
        return money.divide(owed, self._denominator)

    def at_most(self, quantity: int) -> int:
        """A bound on what these units can add, wherever in the window they fall."""
        if self.package:
            size = self.package.size * METERS[self.meter].scale
            return money.divide_up(quantity, size) * _micro(self.package.price)
        dearest = max(tier.price for tier in self.steps)
        return money.divide_up(quantity * int(dearest * _E12), self._denominator)

    @property
    def _denominator(self) -> int:
        return METERS[self.meter].scale * self.per * (_E12 // money.MICRO)


def _micro(price: Decimal) -> int:
    return money.divide(int(price * _E12), _E12 // money.MICRO)
