from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidRequest
from cluster.tenancy import money

AMOUNTS = st.integers(-money.LARGEST, money.LARGEST)


@given(AMOUNTS)
def test_what_is_written_is_read_again(micro: int) -> None:
    if abs(micro) < money.LARGEST:
        assert money.parse(money.plain(micro)) == micro
    assert money.decimal(micro) * money.MICRO == micro


@pytest.mark.parametrize(("micro", "text"), [(0, "0.00"), (1, "0.000001"), (12_500_000, "12.50"), (-1_230_000, "-1.23")])
def test_amounts_have_two_digits_or_as_many_as_they_need(micro: int, text: str) -> None:
    assert money.plain(micro) == text


@pytest.mark.parametrize("text", ["", "1.2345678", "1e3", "NaN", "1,5", " 1", "1 ", "\u0661", "0x1", "--1", "9999999999", "1."])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        money.parse(text)


@given(st.integers(0, 10**18), st.integers(1, 10**12))
def test_division_rounds_half_up_and_never_down_where_it_bounds(numerator: int, denominator: int) -> None:
    assert abs(2 * (money.divide(numerator, denominator) * denominator - numerator)) <= denominator
    assert 0 <= money.divide_up(numerator, denominator) * denominator - numerator < denominator
