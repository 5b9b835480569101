"""What a gateway does now and then beside its requests, in threads of its own, so that nobody waits for it. A chore that fails is
logged and tried again at its next turn."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Chore:
    """Chores of one `line` wait for each other. What may take long has another than what mustn't be late."""

    name: str
    every_s: float
    work: Callable[[], object]
    at_end: Callable[[], object] | None = None  # instead of `work`, the last time
    line: str = "chores"


class Chores:
    """Runs, with a thread for each line, until `close`, which does each once more: what waits is written then."""

    def __init__(self, chores: Sequence[Chore], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._chores = tuple(chores)
        self._closed = threading.Event()
        lines = {chore.line: [each for each in chores if each.line == chore.line] for chore in chores}
        self._threads = [threading.Thread(target=self._run, args=(line,), name=name, daemon=True) for name, line in lines.items()]
        for thread in self._threads:
            thread.start()

    def _run(self, line: Sequence[Chore]) -> None:
        following = dict.fromkeys(line, self._clock())
        while True:
            now = self._clock()
            for chore, due in following.items():
                if due <= now:
                    do(chore)
                    following[chore] = now + chore.every_s
            if self._closed.wait(max(0.0, min(following.values()) - self._clock())):
                return

    def close(self, seconds: float = 10.0) -> None:
        """Waits as long at most for what is being done."""
        self._closed.set()
        until = self._clock() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - self._clock()))
        for chore in self._chores:
            do(chore, chore.at_end)


def do(chore: Chore, work: Callable[[], object] | None = None) -> None:
    try:
        (work or chore.work)()
    except Exception:
        logger.exception("a chore failed", extra={"chore": chore.name})
