"""Who follows whom, against a count by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.blocks import chain
from deployments.engine.following import common, pays


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12))
def test_common_digests_are_those_before_the_first_difference(first: list[int], second: list[int]) -> None:
    alike = 0
    while alike < min(len(first), len(second)) and first[alike] == second[alike]:
        alike += 1
    assert common(chained(first), chained(second)) == alike


def chained(blocks: list[int]) -> list[bytes]:
    digests = [b"salt"]
    for block in blocks:
        digests.append(chain(digests[-1], [block]))
    return digests[1:]


def test_waiting_pays_for_half_of_the_work_and_more() -> None:
    assert pays(8, 16)
    assert pays(16, 17)
    assert not pays(7, 16)
    assert not pays(0, 0)
    assert not pays(-4, 8)
