"""When a stream sends, with a clock that the test holds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.pace import ITEMS_PER_S, LONGEST_S, Gathered, slot_s

SLOT = 0.02


def sent_at(arrivals: list[float], slot: float, *, ends: bool = False) -> list[tuple[float, int]]:
    """When a stream whose items come at `arrivals` sends, and how many each time; the last is urgent if it `ends`."""
    stream, sent = Gathered[int](), []
    for number, now in enumerate(arrivals):
        if stream.due_s <= now:
            sent.append((stream.due_s, len(stream.take(stream.due_s))))
        stream.add([number], now_s=now, slot_s=slot, urgent=ends and number == len(arrivals) - 1)
        if stream.due_s <= now:
            sent.append((now, len(stream.take(now))))
    if stream.due_s < math.inf:
        sent.append((stream.due_s, len(stream.take(stream.due_s))))
    return sent


def test_the_first_goes_at_once_and_what_follows_is_gathered_to_the_end_of_the_slot() -> None:
    assert sent_at([1.001, 1.005, 1.010, 1.025], SLOT) == [(1.001, 1), (pytest.approx(1.02), 2), (pytest.approx(1.04), 1)]


def test_the_last_never_waits() -> None:
    assert sent_at([1.001, 1.005, 1.006], SLOT, ends=True) == [(1.001, 1), (1.006, 2)]


def test_a_model_slower_than_the_slots_streams_token_by_token() -> None:
    arrivals = [1.001 + 0.03 * n for n in range(20)]
    assert sent_at(arrivals, SLOT) == [(at, 1) for at in arrivals]


def test_without_an_interval_everything_goes_at_once() -> None:
    arrivals = [1.0, 1.0001, 1.0002]
    assert slot_s(0.0, 1000) == 0.0
    assert sent_at(arrivals, 0.0) == [(at, 1) for at in arrivals]


def test_streams_that_started_apart_send_together() -> None:
    second = [sent_at([start, 1.012, 1.018], SLOT)[1][0] for start in (1.001, 1.004, 1.010)]
    assert len(set(second)) == 1


def test_a_consumer_that_was_busy_gets_all_of_it_at_once() -> None:
    stream = Gathered[int]()
    for number in range(5):
        stream.add([number], now_s=1.0 + number, slot_s=SLOT, urgent=False)
    assert (stream.due_s, stream.take(6.0)) == (1.0, [0, 1, 2, 3, 4])
    assert stream.due_s == math.inf


@given(st.floats(0.001, 1.0), st.integers(1, 4096))
def test_slots_are_as_asked_until_all_streams_together_would_send_too_much(interval: float, streams: int) -> None:
    slot = slot_s(interval, streams)
    assert interval <= slot <= max(interval, LONGEST_S)
    assert slot in (interval, LONGEST_S) or streams / slot <= ITEMS_PER_S * 1.001


@given(st.lists(st.floats(0, 0.05), min_size=1, max_size=60), st.sampled_from([0.0, 0.005, 0.02, 0.1]))
def test_nothing_is_lost_doubled_or_held_longer_than_a_slot(gaps: list[float], slot: float) -> None:
    now, arrivals = 1000.0, []
    for gap in gaps:
        arrivals.append(now := now + gap)
    sent = sent_at(arrivals, slot)
    assert sum(count for _, count in sent) == len(arrivals)
    waiting = list(arrivals)
    for at, count in sent:
        assert all(at - arrival <= slot + 1e-6 for arrival in waiting[:count])
        del waiting[:count]
    if slot:
        spoken = [math.floor(at / slot + 1e-6) for at, _ in sent[1:]]
        assert len(spoken) == len(set(spoken)), "one item a slot"
