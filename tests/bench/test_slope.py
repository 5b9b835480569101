"""The estimator of growth: it finds a slope, and knows when it can't."""

from __future__ import annotations

import random

import pytest

from bench.slope import slope


def samples(
    per_minute: float, *, noise: float = 0.0, alike: float = 0.0, count: int = 600, seed: int = 0
) -> list[tuple[float, int]]:
    """One each half second: a line in MB per minute, and noise that remembers `alike` of the sample before."""
    rng, drift, found = random.Random(seed), 0.0, []
    for number in range(count):
        drift = alike * drift + rng.gauss(0, noise)
        found.append((number / 2, round((400 + per_minute * number / 120 + drift) * 1e6)))
    return found


def test_a_line_has_its_slope_and_no_error() -> None:
    found = slope(samples(3.0))
    assert found.mb_per_minute == pytest.approx(3.0, abs=1e-4)
    assert found.error < 1e-4
    assert found.minutes == pytest.approx(599 / 120)


def test_level_memory_has_no_slope() -> None:
    found = slope(samples(0.0))
    assert (found.mb_per_minute, found.error) == (pytest.approx(0.0, abs=1e-9), pytest.approx(0.0, abs=1e-9))


@pytest.mark.parametrize("alike", [0.0, 0.9])
def test_the_error_covers_the_truth(alike: float) -> None:
    found = [slope(samples(0.5, noise=1.0, alike=alike, seed=seed)) for seed in range(100)]
    covered = sum(abs(one.mb_per_minute - 0.5) <= 2 * one.error for one in found)
    assert covered >= 88


def test_noise_that_is_alike_widens_the_error() -> None:
    assert slope(samples(0.0, noise=1.0, alike=0.9)).error > 3 * slope(samples(0.0, noise=1.0)).error


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="9 samples"):
        slope(samples(0.0, count=9))
