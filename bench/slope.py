"""Whether memory grows: a straight line through samples of it, and how far its slope can be trusted.

The slope is that of ordinary least squares. Neighbouring samples of memory are alike (what was allocated a moment ago still is), so
that n samples tell less than n independent ones: the usual standard error is widened by sqrt((1 + r) / (1 - r)), where r is the
correlation of a residual with the next one (as for a first-order autoregression). One step of an allocator's arena within a short
window looks like a slope; only a longer window tells the two apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_ALIKE = 0.99
"""Highest correlation that is believed: at 1 the error would be infinite."""


@dataclass(frozen=True)
class Slope:
    """In megabytes (10^6 bytes) per minute; `error` is one standard error."""

    mb_per_minute: float
    error: float
    num_samples: int
    minutes: float

    def __str__(self) -> str:
        return f"{self.mb_per_minute:+.2f} ± {2 * self.error:.2f} MB a minute over {self.minutes:.1f} minutes"


def slope(samples: Sequence[tuple[float, int]]) -> Slope:
    """Of (seconds, bytes). Raises ValueError for fewer than ten samples."""
    if len(samples) < 10:
        raise ValueError(f"{len(samples)} samples are too few for a slope; ten are the least")
    minutes = np.array([seconds for seconds, _ in samples]) / 60
    megabytes = np.array([size for _, size in samples]) / 1e6
    centred = minutes - minutes.mean()
    per_minute = float(centred @ megabytes / (centred @ centred))
    residuals = megabytes - megabytes.mean() - per_minute * centred
    variance = float(residuals @ residuals) / (len(samples) - 2)
    alike = float(residuals[1:] @ residuals[:-1] / (residuals @ residuals)) if variance > 0 else 0.0
    alike = min(max(alike, 0.0), MOST_ALIKE)
    error = (variance / float(centred @ centred) * (1 + alike) / (1 - alike)) ** 0.5
    return Slope(per_minute, error, len(samples), float(minutes[-1] - minutes[0]))
