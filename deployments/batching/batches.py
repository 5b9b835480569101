"""Rows of many calls through one model, a step at a time: gather, run beside the event loop, deliver, drop what nobody wants.

All state lives on the event loop; only the model runs in a thread. Nobody waits for batch-mates: a step begins as soon as the one
before has ended, with whatever has come meanwhile. `lines.py` decides what is in it, this decides how large it may be: what the
model does in `target_s`, as measured, so that whoever comes waits no longer for those before.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cluster.errors import Overloaded, PlatformError, Unavailable
from cluster.tenancy.attribution import MICROSECONDS, ComputeMeter
from deployments.batching.lines import Call, Lines, Piece

log = logging.getLogger(__name__)

LEAST_TOKENS, MOST_TOKENS = 128, 1 << 16
"""Bounds of a step."""
FIRST_GUESS = 2000.0
"""Tokens a second, before anything was measured."""

Row = TypeVar("Row", bound=Sized)
Result = TypeVar("Result")


@dataclass(slots=True)
class Answer:
    """What a call gets, as it fills."""

    results: list[Any]
    missing: int
    done: asyncio.Future[None]
    compute_us: int = 0


class Batches(Generic[Row, Result]):
    """Must be made on the event loop where it is used."""

    def __init__(
        self,
        run: Callable[[Sequence[Row]], Sequence[Result | PlatformError]],
        *,
        target_s: float,
        limit: int,
        name: str,
        speed: float = FIRST_GUESS,
    ) -> None:
        """`run` gets the rows of one step, in a thread of its own that is called `name`, and gives a result for each, or the error
        that its call gets; `limit` is in tokens, `speed` a first guess of how many a second it takes."""
        self._run, self._target_s, self._name = run, target_s, name
        self._lines = Lines(limit)
        self._answers: dict[Call, Answer] = {}
        self._work = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._speed = speed
        self._began: float | None = None
        self._counts = {"steps": 0, "rows": 0, "tokens": 0, "aborted": 0, "busy_s": 0.0}
        self._meter = ComputeMeter()
        self._started = time.monotonic()
        self._loop = asyncio.get_running_loop().create_task(self._serve())

    async def submit(self, tenant: bytes, rows: Sequence[Row]) -> tuple[list[Result], int]:
        """One result a row, and the microseconds of the steps that were for them. Raises Overloaded at once when the queue is full,
        or later when this call had to make room for a tenant that has less. Cancelling this takes out the rows that still wait."""
        leaving = self._lines.make_room(tenant, sum(len(row) for row in rows))
        if leaving is None:
            raise self._full()
        for other in leaving:
            if not (waiting := self._answers[other].done).done():
                waiting.set_exception(self._full())
        call = self._lines.add(tenant, rows)
        answer = self._answers[call] = Answer([None] * len(rows), len(rows), asyncio.get_running_loop().create_future())
        self._work.set()
        try:
            await answer.done
        finally:
            del self._answers[call]
            self._counts["aborted"] += bool(call.rows)
            self._lines.discard(call)
        return answer.results, answer.compute_us

    @property
    def stats(self) -> dict[str, float]:
        waiting = {"waiting": self._lines.num_rows, "waiting_tokens": self._lines.num_tokens, "streams": len(self._answers)}
        times = {"attributed_s": self._meter.attributed / MICROSECONDS, "held_s": time.monotonic() - self._started}
        return {**self._counts, **waiting, **times, "tokens_per_s": self._speed}

    @property
    def step_s(self) -> float:
        """How long the step that runs has been running."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    @property
    def is_dead(self) -> bool:
        return self._loop.done()

    async def close(self) -> None:
        """End the thread once its step is done; calls that wait are refused."""
        self._loop.cancel()
        await asyncio.gather(self._loop, return_exceptions=True)
        for answer in self._answers.values():
            if not answer.done.done():
                answer.done.set_exception(Unavailable("The model is being stopped.", retry_after_s=1.0))
        await asyncio.to_thread(self._thread.shutdown)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._work.wait()
            while step := self._lines.take(step_tokens(self._speed, self._target_s)):
                began = self._began = time.monotonic()
                rows: list[Any] = [piece.row for piece in step]
                try:
                    results = await loop.run_in_executor(self._thread, self._run, rows)
                except Exception as error:
                    log.exception("a step failed", extra={"rows": len(step)})
                    results = [PlatformError(f"the {self._name} failed: {type(error).__name__}")] * len(step)
                self._deliver(step, results)
                self._count(step, time.monotonic() - began)
            self._work.clear()

    def _deliver(self, step: Sequence[Piece], results: Sequence[Result | PlatformError]) -> None:
        for piece, result in zip(step, results, strict=True):
            answer = self._answers.get(piece.call)
            if answer is None or answer.done.done():
                continue
            if isinstance(result, PlatformError):
                answer.done.set_exception(result)
                continue
            answer.results[piece.place] = result
            answer.missing -= 1
            if not answer.missing:
                answer.done.set_result(None)

    def _count(self, step: Sequence[Piece], seconds: float) -> None:
        lengths = [len(piece.row) for piece in step]
        tokens = sum(lengths)
        self._began = None
        self._counts["steps"] += 1
        self._counts["rows"] += len(step)
        self._counts["tokens"] += tokens
        self._counts["busy_s"] += seconds
        self._speed = smoothed(self._speed, tokens, seconds)
        for piece, share in zip(step, self._meter.step(seconds, lengths), strict=True):
            if answer := self._answers.get(piece.call):  # its caller wakes up after this
                answer.compute_us += share

    def _full(self) -> Overloaded:
        wait_s = min(30.0, max(1.0, self._lines.num_tokens / self._speed))
        return Overloaded(f"The model has {self._lines.num_rows} inputs waiting, as many as it may.", retry_after_s=wait_s)


def step_tokens(speed: float, target_s: float) -> int:
    """Tokens of a step that takes about `target_s`."""
    return min(MOST_TOKENS, max(LEAST_TOKENS, int(speed * target_s)))


def smoothed(speed: float, tokens: int, seconds: float) -> float:
    """Tokens a second after another step. A step of few tokens says little of how fast many are, so it weighs little."""
    weight = 0.3 * min(1.0, tokens / 1024)
    return speed + weight * (tokens / max(seconds, 1e-6) - speed)
