"""Amounts of money: whole micro-units of a currency, as `int`. Only prices are Decimal; nothing here is ever a float.

A micro-unit is a millionth of the currency's unit (of a euro, not of a cent).
"""

from __future__ import annotations

import re
from decimal import Decimal

from cluster.errors import InvalidRequest

MICRO = 1_000_000
CURRENCY = re.compile(r"[A-Z]{3}\Z")  # ISO 4217
LARGEST = 10**15  # micro-units: a thousand million units fit 64 bits a thousand times over

_AMOUNT = re.compile(r"-?[0-9]{1,9}(?:\.[0-9]{1,6})?\Z")


def parse(text: str, param: str = "amount") -> int:
    """Micro-units of `12.50`. Raises InvalidRequest for anything but digits with at most six behind the point."""
    if _AMOUNT.match(text) is None:
        raise InvalidRequest(f"{text[:40]!r} is not an amount like 12.50 (at most six digits behind the point)", param=param)
    return int(Decimal(text) * MICRO)


def decimal(micro: int) -> Decimal:
    """The amount in units of the currency, exact."""
    return Decimal(micro).scaleb(-6)


def plain(micro: int) -> str:
    """`12.50`, `0.000003`: two digits behind the point, or as many more as the amount has."""
    sign, (whole, rest) = "-" * (micro < 0), divmod(abs(micro), MICRO)
    digits = f"{rest:06}".rstrip("0").ljust(2, "0")
    return f"{sign}{whole}.{digits}"


def divide(numerator: int, denominator: int) -> int:
    """Rounded half up, in whole numbers throughout. `numerator` is never negative."""
    return (2 * numerator + denominator) // (2 * denominator)


def divide_up(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
