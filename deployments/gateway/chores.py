"""What a gateway does now and then beside its requests, in one thread, so that nobody waits for it. A chore that fails is logged
and tried again at its next turn."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Chore:
    name: str
    every_s: float
    work: Callable[[], object]
    at_end: Callable[[], object] | None = None  # instead of `work`, the last time


class Chores:
    """Runs until `close`, which does each once more: what waits is written then."""

    def __init__(self, chores: Sequence[Chore], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = {chore: clock() for chore in chores}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chores", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._next:
            now = self._clock()
            for chore, due in self._next.items():
                if due <= now:
                    do(chore)
                    self._next[chore] = now + chore.every_s
            if self._closed.wait(max(0.0, min(self._next.values()) - self._clock())):
                return

    def close(self, seconds: float = 10.0) -> None:
        self._closed.set()
        self._thread.join(seconds)
        for chore in self._next:
            do(chore, chore.at_end)


def do(chore: Chore, work: Callable[[], object] | None = None) -> None:
    try:
        (work or chore.work)()
    except Exception:
        logger.exception("a chore failed", extra={"chore": chore.name})
