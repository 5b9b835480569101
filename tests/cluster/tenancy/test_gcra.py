from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.tenancy import gcra
from cluster.tenancy.gcra import EMPTY, MINUTE_US, NEVER_US, Bucket, Rate

rates = st.builds(Rate, st.integers(1, 5000), st.integers(1, 5000))
steps = st.lists(st.tuples(st.integers(0, 2 * MINUTE_US), st.integers(1, 600)), max_size=60)


def admitted(rate: Rate, calls: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(time, units) of the calls that were let through; a call is (pause before it, units)."""
    bucket, now, taken = EMPTY, 0, []
    for pause, units in calls:
        now += pause
        if gcra.wait_us(rate, bucket, now, units) == 0:
            bucket = gcra.spend(rate, bucket, now, units)
            taken.append((now, units))
    return taken


@settings(max_examples=300)
@given(rates, steps)
def test_no_window_holds_more_than_its_share_and_the_burst(rate: Rate, calls: list[tuple[int, int]]) -> None:
    taken = admitted(rate, calls)
    for first, (start, _) in enumerate(taken):
        spent = 0
        for end, units in taken[first:]:
            spent += units
            assert spent * MINUTE_US <= rate.burst * MINUTE_US + rate.limit * (end - start)


@settings(max_examples=300)
@given(rates, steps)
def test_what_is_given_back_counts_as_never_spent_in_no_window_more(rate: Rate, calls: list[tuple[int, int]]) -> None:
    bucket, now = EMPTY, 0
    flows: list[tuple[int, int]] = []
    for pause, units in calls:
        now += pause
        if gcra.wait_us(rate, bucket, now, units) == 0:
            bucket = gcra.spend(rate, bucket, now, units)
            bucket = gcra.spend(rate, bucket, now + pause // 2, -(units // 2))
            flows += [(now, units), (now + pause // 2, -(units // 2))]
            now += pause // 2
    for first, (start, _) in enumerate(flows):
        net = 0
        for end, units in flows[first:]:
            net += units
            assert net * MINUTE_US <= rate.burst * MINUTE_US + rate.limit * (end - start)


@given(rates, steps, st.integers(1, 5000))
def test_who_waits_as_told_is_let_through_and_not_before(rate: Rate, calls: list[tuple[int, int]], units: int) -> None:
    bucket, now = EMPTY, 0
    for pause, spent in calls:
        now += pause
        bucket = gcra.spend(rate, bucket, now, spent)
    wait = gcra.wait_us(rate, bucket, now, units)
    if units > rate.burst:
        assert wait == NEVER_US
    else:
        assert gcra.wait_us(rate, bucket, now + wait, units) == 0
        assert wait == 0 or gcra.wait_us(rate, bucket, now + wait - 1, units) > 0


@given(rates, steps, st.lists(st.integers(-(10**15), 10**15), max_size=60))
def test_a_jumping_clock_gives_one_burst_at_most_a_jump_and_blocks_nobody(
    rate: Rate, calls: list[tuple[int, int]], jumps: list[int]
) -> None:
    bucket, real, seen, spent = EMPTY, 0, 0, 0
    for number, (pause, units) in enumerate(calls):
        real += pause
        seen += pause + (jumps[number] if number < len(jumps) else 0)
        if gcra.wait_us(rate, bucket, seen, units) == 0:
            bucket, spent = gcra.spend(rate, bucket, seen, units), spent + units
    assert spent * MINUTE_US <= (1 + len(jumps)) * rate.burst * MINUTE_US + rate.limit * real
    full = min(rate.burst, 600)
    told = gcra.wait_us(rate, bucket, seen, full)
    assert told <= -(-rate.burst * MINUTE_US // rate.limit), "never longer than a full bucket takes to leak"


@given(rates, st.integers(0, 10**12), st.integers(0, 10**6))
def test_room_is_exactly_what_is_let_through(rate: Rate, debt: int, now: int) -> None:
    bucket = Bucket(debt, 0)
    free = gcra.room(rate, bucket, now)
    assert gcra.wait_us(rate, bucket, now, free) == 0 or free == 0
    assert gcra.wait_us(rate, bucket, now, free + 1) > 0


def test_the_whole_burst_at_once_then_one_at_a_time() -> None:
    rate, bucket = Rate(limit=7, burst=7), EMPTY
    for _ in range(7):
        assert gcra.wait_us(rate, bucket, 0, 1) == 0
        bucket = gcra.spend(rate, bucket, 0, 1)
    assert gcra.wait_us(rate, bucket, 0, 1) == -(-MINUTE_US // 7)
    assert gcra.empty_in_us(rate, bucket, 0) == MINUTE_US


def test_a_limit_of_nothing_lets_nothing_through() -> None:
    assert gcra.wait_us(Rate(0, 0), EMPTY, 10**9, 1) == NEVER_US
    assert gcra.empty_in_us(Rate(0, 0), EMPTY, 0) == 0
