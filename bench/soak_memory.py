"""What a soak leaves in memory: objects of the engine that somebody still holds, and the bytes of all of its processes."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter

from bench.engines import rss_bytes, tree
from deployments.engine.messages import Request
from deployments.engine.sequence import Sequence
from deployments.engine.structured import Matcher

SAMPLE_S = 0.25


def retained() -> tuple[int, int, int]:
    """Requests, sequences and matchers that anything in this process holds."""
    gc.collect()
    kinds = Counter(map(type, gc.get_objects()))
    return kinds[Request], kinds[Sequence], kinds[Matcher]


class Memory:
    """Samples of this process and its children: (seconds, bytes)."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.samples: list[tuple[float, int]] = []

    def sample(self) -> None:
        now = time.monotonic() - self._began
        if not self.samples or now - self.samples[-1][0] >= SAMPLE_S:
            self.samples.append((now, sum(map(rss_bytes, tree(os.getpid())))))
