"""Who calls and what it costs, for the tests of the ledger: prices that a head can multiply."""

from __future__ import annotations

from cluster.tenancy.rating import PriceList
from cluster.types import Principal

PRICES = PriceList.model_validate(
    {
        "charges": [
            {"meter": "input_tokens", "price": "2", "per": 1_000_000},
            {"meter": "cached_tokens", "price": "1", "per": 1_000_000},
            {"meter": "output_tokens", "price": "5", "per": 1_000_000},
        ]
    }
)
"""In micro-units: 2 for a token of input, 1 for a cached one, 5 for one of output."""


def caller(project: str = "web", key: str = "k1", organization: str = "acme") -> Principal:
    return Principal(project, key, frozenset({"inference"}), organization)
