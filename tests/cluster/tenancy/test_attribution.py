from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.tenancy.attribution import ComputeMeter, Reconciliation, split


@given(st.integers(0, 10**9), st.dictionaries(st.integers(), st.integers(0, 5000), min_size=1))
def test_shares_sum_to_the_step_and_go_by_rows(microseconds: int, rows: dict[int, int]) -> None:
    shares = split(microseconds, rows)
    total = sum(rows.values())
    assert sum(shares.values()) == (microseconds if total else 0)
    assert all(abs(shares[key] * total - microseconds * rows[key]) < total for key in rows if total)


@given(
    st.lists(
        st.tuples(st.floats(0, 0.5), st.dictionaries(st.integers(0, 9), st.integers(1, 300), min_size=1)), min_size=1, max_size=200
    )
)
def test_what_is_attributed_is_the_time_of_the_steps(steps: list[tuple[float, dict[int, int]]]) -> None:
    meter = ComputeMeter[int]()
    for seconds, rows in steps:
        meter.step(seconds, rows)
    attributed = sum(meter.close(key) for key in range(10))
    assert attributed == meter.busy
    assert attributed == pytest.approx(sum(seconds for seconds, _ in steps) * 1e6, abs=1.5)
    assert all(meter.close(key) == 0 for key in range(10))


def test_many_steps_shorter_than_a_microsecond_are_not_lost() -> None:
    meter = ComputeMeter[str]()
    for _ in range(10_000):
        meter.step(0.25e-6, {"a": 1})
    assert meter.so_far("a") == 2500


def test_a_reconciliation_says_how_much_is_missing() -> None:
    assert Reconciliation(held=10, busy=8, attributed=8).error == 0
    short = Reconciliation(held=10, busy=8, attributed=6)
    assert (short.error, short.idle) == (0.25, 2)
    assert "+25.0000%" in str(short)
    assert Reconciliation(0, 0, 0).error == 0
