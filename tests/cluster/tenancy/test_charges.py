from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.tenancy.charges import Charge
from cluster.tenancy.metered import METERS

PRICE = st.decimals(0, 1000, places=9)


@st.composite
def charges(draw: st.DrawFn) -> Charge:
    meter = draw(st.sampled_from(sorted(METERS)))
    form = draw(st.sampled_from(["price", "tiers", "package"]))
    if form == "package":
        return Charge.model_validate({"meter": meter, "package": {"size": draw(st.integers(1, 5000)), "price": draw(PRICE)}})
    per = draw(st.sampled_from([1, 1000, 1_000_000]))
    if form == "price":
        return Charge(meter=meter, per=per, price=draw(PRICE))
    bounds = sorted(draw(st.sets(st.integers(1, 10**6), max_size=4)))
    tiers = [{"up_to": bound, "price": draw(PRICE)} for bound in [*bounds, None]]
    return Charge.model_validate({"meter": meter, "per": per, "tiers": tiers})


@given(charges(), st.lists(st.integers(0, 10**7), min_size=1, max_size=20), st.randoms())
def test_requests_add_up_to_the_whole_in_any_order_and_none_passes_its_bound(charge: Charge, sizes: list[int], random: Any) -> None:
    random.shuffle(sizes)
    before = total = 0
    for size in sizes:
        cost = charge.cost(before + size) - charge.cost(before)
        assert 0 <= cost <= charge.at_most(size)
        before, total = before + size, total + cost
    assert total == charge.cost(sum(sizes))


@given(PRICE, st.sampled_from([1, 1000, 1_000_000]), st.integers(0, 10**12))
def test_a_plain_price_is_multiplied_and_rounded_once(price: Decimal, per: int, quantity: int) -> None:
    exact = Fraction(price) * quantity / per * 1_000_000
    assert abs(Charge(meter="output_tokens", per=per, price=price).cost(quantity) - exact) <= Fraction(1, 2)


def tiered(meter: str, **more: Any) -> Charge:
    return Charge.model_validate({"meter": meter, **more})


def test_requests_of_a_day_in_tiers() -> None:
    charge = tiered(
        "requests", window="day", tiers=[{"up_to": 100, "price": "0"}, {"up_to": 200, "price": "0.01"}, {"price": "0.005"}]
    )
    assert [charge.cost(n) for n in (100, 101, 200, 202)] == [0, 10_000, 1_000_000, 1_010_000]


def test_volume_that_was_traded_in_a_month() -> None:
    charge = tiered("traded_volume", tiers=[{"up_to": 10_000, "price": "0.001"}, {"price": "0.0005"}])
    assert charge.cost(10_000 * 1_000_000) == 10_000_000
    assert charge.cost(30_000 * 1_000_000) == 20_000_000


def test_a_compute_second_is_counted_in_microseconds() -> None:
    assert Charge(meter="compute_seconds", price=Decimal("0.0036")).cost(1_500_000) == 5400


def test_a_package_is_paid_when_it_is_begun() -> None:
    charge = tiered("requests", package={"size": 1000, "price": "5"})
    assert [charge.cost(n) for n in (0, 1, 1000, 1001)] == [0, 5_000_000, 5_000_000, 10_000_000]


@pytest.mark.parametrize(
    "bad",
    [
        {"meter": "words", "price": "1"},
        {"meter": "requests"},
        {"meter": "requests", "price": "1", "package": {"size": 1, "price": "1"}},
        {"meter": "requests", "price": 0.1},
        {"meter": "requests", "price": "-1"},
        {"meter": "requests", "price": "NaN"},
        {"meter": "requests", "price": "1", "per": 7},
        {"meter": "requests", "price": "0.0000000000001"},
        {"meter": "requests", "tiers": [{"up_to": 5, "price": "1"}]},
        {"meter": "requests", "tiers": [{"up_to": 5, "price": "1"}, {"up_to": 5, "price": "1"}, {"price": "1"}]},
        {"meter": "requests", "tiers": [{"up_to": 9, "price": "1"}, {"up_to": 5, "price": "1"}, {"price": "1"}]},
        {"meter": "requests", "tiers": [{"price": "1"}, {"price": "1"}]},
        {"meter": "requests", "package": {"size": 0, "price": "1"}},
        {"meter": "requests", "price": "1", "discount": "1"},
    ],
)
def test_what_is_no_charge_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        Charge.model_validate(bad)
