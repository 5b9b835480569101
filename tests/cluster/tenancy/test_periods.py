from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidRequest
from cluster.tenancy import periods


@given(st.datetimes(datetime(2000, 1, 1), datetime(2099, 12, 31)).map(lambda moment: moment.replace(tzinfo=UTC).timestamp()))
def test_a_moment_lies_in_its_month_and_the_months_days_are_its_own(at: float) -> None:
    month = periods.month_of(at)
    assert periods.month_start(month) <= at < periods.month_start(month + 1)
    assert periods.parse_month(periods.month_text(month)) == month
    assert periods.month_start(month) % periods.DAY_S == 0


def test_december_is_followed_by_january() -> None:
    assert periods.month_text(periods.parse_month("2026-12") + 1) == "2027-01"
    assert periods.iso(periods.month_start(periods.parse_month("2027-01"))) == "2027-01-01T00:00:00Z"


@pytest.mark.parametrize("text", ["2026-13", "2026-00", "26-01", "2026-1", "1999-12", "2026-11-01", ""])
def test_what_is_no_month_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        periods.parse_month(text)
