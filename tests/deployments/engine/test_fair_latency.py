"""What fairness does to latencies, in simulated time: reading the weights takes 1, each token 1/300 more.

That is about an H100's bandwidth over its bfloat16 rate.
"""

from __future__ import annotations

import random

from deployments.engine.sequence import Sequence
from tests.deployments.engine.test_fair_scheduling import end, make
from tests.deployments.engine.test_scheduler import make_scheduler

LATENCY_RATIO = 1.5
"""What a greedy neighbour may do to the 99th percentile of another's latency."""
TOKEN_S = 1 / 300
SLOTS, PROMPT, OUTPUT = 64, 128, 64
CAPACITY = SLOTS / OUTPUT / (1 + TOKEN_S * SLOTS * (1 + PROMPT / OUTPUT))
"""Requests in a unit of time when every place is always taken."""


def latencies(rates: dict[str, float], *, is_fair: bool, duration: float) -> dict[str, list[float]]:
    """Of the requests that ended, by tenant; arrivals are Poisson, lengths vary by half."""
    options = {"max_sequences": SLOTS, "max_batch_tokens": 256, "prefix_cache": False}
    scheduler = make_scheduler(num_blocks=4096, block_size=16, **options)
    arrivals = sorted(
        (when, name, number) for name, rate in rates.items() for number, when in enumerate(poisson(name, rate, duration))
    )
    began: dict[Sequence, tuple[str, float]] = {}
    found: dict[str, list[float]] = {name: [] for name in rates}
    now, upcoming = 0.0, iter(arrivals)
    arrival = next(upcoming, None)
    while now < duration and (arrival or scheduler.has_work):
        while arrival and (arrival[0] <= now or not scheduler.has_work):
            when, name, number = arrival
            rng = random.Random(f"{name} {number}")
            sequence = make(name if is_fair else "everybody", half_more_or_less(rng, PROMPT), half_more_or_less(rng, OUTPUT))
            scheduler.add(sequence)
            began[sequence] = name, when
            now, arrival = max(now, when), next(upcoming, None)
        slices = scheduler.schedule()
        now += 1 + TOKEN_S * sum(item.count for item in slices)
        end(scheduler, slices)
        for item in slices:
            if item.sequence.finish_reason:
                name, when = began.pop(item.sequence)
                found[name].append(now - when)
    return found


def poisson(name: str, rate: float, duration: float) -> list[float]:
    rng, now, times = random.Random(name), 0.0, []
    while (now := now + rng.expovariate(rate)) < duration:
        times.append(now)
    return times


def half_more_or_less(rng: random.Random, middle: int) -> int:
    return rng.randint(middle // 2, middle * 3 // 2)


def p99(values: list[float]) -> float:
    assert len(values) > 300, "too few to speak of a percentile"
    return sorted(values)[int(0.99 * len(values))]


def modest_latencies(*, is_fair: bool, duration: float) -> tuple[list[float], list[float]]:
    """Of a tenant that uses most of its half of the machine: alone, and beside one that wants 20 times the other half."""
    modest, greedy = {"modest": CAPACITY / 2 * 0.8}, {"greedy": CAPACITY / 2 * 20}
    alone = latencies(modest, is_fair=is_fair, duration=duration)
    return alone["modest"], latencies(modest | greedy, is_fair=is_fair, duration=duration)["modest"]


def test_tenant_at_twenty_times_its_share_moves_anothers_p99_by_less_than_half() -> None:
    alone, beside = modest_latencies(is_fair=True, duration=1500.0)
    assert len(beside) > 0.9 * len(alone), "only what ended was measured"
    assert p99(beside) < LATENCY_RATIO * p99(alone)


def test_first_come_first_served_would_not_have_held_it() -> None:
    alone, beside = modest_latencies(is_fair=False, duration=1500.0)
    assert len(beside) < 0.5 * len(alone)
    assert sorted(beside)[len(beside) // 2] > 2 * LATENCY_RATIO * p99(alone)
