from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.tenancy.attribution import ComputeMeter, Reconciliation, split

rows = st.lists(st.integers(0, 5000), min_size=1, max_size=300).filter(any)


@given(st.integers(0, 10**9), rows)
def test_shares_sum_to_the_step_and_go_by_rows(microseconds: int, rows: list[int]) -> None:
    shares, total = split(microseconds, rows), sum(rows)
    assert sum(shares) == microseconds
    assert all(abs(share - Fraction(microseconds * count, total)) < 1 for share, count in zip(shares, rows, strict=True))


@given(st.lists(st.tuples(st.floats(0, 0.5), rows), min_size=1, max_size=100))
def test_what_is_attributed_is_the_time_of_the_steps(steps: list[tuple[float, list[int]]]) -> None:
    meter = ComputeMeter()
    got = sum(sum(meter.step(seconds, rows)) for seconds, rows in steps)
    assert got == meter.attributed
    assert got == pytest.approx(sum(seconds for seconds, _ in steps) * 1e6, abs=1.5)


def test_many_steps_shorter_than_a_microsecond_are_not_lost() -> None:
    meter = ComputeMeter()
    assert sum(sum(meter.step(0.25e-6, [1])) for _ in range(10_000)) == 2500


def test_two_who_share_every_step_pay_the_same() -> None:
    meter, paid = ComputeMeter(), [0, 0]
    for step in range(10_000):
        for place, share in enumerate(meter.step(0.0031 + step * 1.37e-7, [1, 1])):
            paid[place] += share
    assert abs(paid[0] - paid[1]) < 1e-3 * sum(paid)


def test_a_step_without_rows_is_nobodys() -> None:
    meter = ComputeMeter()
    assert meter.step(1.0, []) == []
    assert meter.step(1.0, [0, 0]) == [0, 0]
    assert meter.attributed == 0


def test_a_reconciliation_says_how_much_is_missing() -> None:
    assert Reconciliation(held=10, busy=8, attributed=8, billed=8).error == 0
    short = Reconciliation(held=10, busy=8, attributed=8, billed=6)
    assert (short.error, short.idle) == (0.25, 2)
    assert Reconciliation(10, 8, 8, 10).error == -0.25
    assert Reconciliation(10, 0, 0, 0).error == 0
