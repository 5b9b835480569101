"""Rows of many calls through one model, a step at a time: gather, run beside the event loop, deliver, drop what nobody wants.

All state lives on the event loop; only the model runs in a thread. `lines.py` decides what is in a step, this decides how large a
step is: what the model does in `target_s`, as measured, so that whoever comes waits no longer for those before.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cluster.errors import Overloaded, PlatformError, Unavailable
from deployments.encode.lines import Call, Lines, Piece
from deployments.encode.row import Floats, Row

log = logging.getLogger(__name__)

LEAST_TOKENS, MOST_TOKENS = 128, 1 << 16
"""Bounds of a step."""
FIRST_GUESS = 2000.0
"""Tokens a second, before anything was measured."""


@dataclass(slots=True)
class Answer:
    """What a call gets, as it fills."""

    vectors: Floats
    missing: int
    done: asyncio.Future[None]


class Batcher:
    """Must be started on the event loop where it is used."""

    def __init__(self, run: Callable[[Sequence[Row]], Floats], width: int, *, target_s: float, limit: int) -> None:
        """`run` gets the rows of one step, in a thread of its own; `limit` is in tokens."""
        self._run, self._width, self._target_s = run, width, target_s
        self._lines = Lines(limit)
        self._answers: dict[Call, Answer] = {}
        self._work = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._speed = FIRST_GUESS
        self._began: float | None = None
        self._counts = {"steps": 0, "rows": 0, "prompt_tokens": 0, "aborted": 0, "busy_s": 0.0}
        self._loop = asyncio.get_running_loop().create_task(self._serve())

    async def encode(self, tenant: bytes, rows: Sequence[Row]) -> Floats:
        """One vector a row. Raises Overloaded at once when the queue is full, or later when this call had to make room for a tenant
        that has less. Cancelling this takes out the rows that still wait."""
        leaving = self._lines.make_room(tenant, sum(len(row) for row in rows))
        if leaving is None:
            raise self._full()
        for other in leaving:
            if not (waiting := self._answers[other].done).done():
                waiting.set_exception(self._full())
        call = self._lines.add(tenant, rows)
        done = asyncio.get_running_loop().create_future()
        answer = self._answers[call] = Answer(np.empty((len(rows), self._width), np.float32), len(rows), done)
        self._work.set()
        try:
            await done
        finally:
            del self._answers[call]
            self._counts["aborted"] += bool(call.rows)
            self._lines.discard(call)
        return answer.vectors

    @property
    def stats(self) -> dict[str, float]:
        waiting = {"waiting": self._lines.num_rows, "waiting_tokens": self._lines.num_tokens, "streams": len(self._answers)}
        return {**self._counts, **waiting, "tokens_per_s": self._speed}

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
                try:
                    vectors = await loop.run_in_executor(self._thread, self._run, [piece.row for piece in step])
                except Exception as error:
                    log.exception("a step failed", extra={"rows": len(step)})
                    self._fail(step, error)
                else:
                    self._deliver(step, vectors)
                self._count(step, time.monotonic() - began)
            self._work.clear()

    def _deliver(self, step: Sequence[Piece], vectors: Floats) -> None:
        for piece, vector in zip(step, vectors, strict=True):
            answer = self._answers.get(piece.call)
            if answer is None or answer.done.done():
                continue
            answer.vectors[piece.place] = vector
            answer.missing -= 1
            if not np.isfinite(vector).all():
                answer.done.set_exception(PlatformError("the model gave numbers that are not finite", code="not_finite"))
            elif not answer.missing:
                answer.done.set_result(None)

    def _fail(self, step: Sequence[Piece], error: Exception) -> None:
        for piece in step:
            answer = self._answers.get(piece.call)
            if answer is not None and not answer.done.done():
                answer.done.set_exception(PlatformError(f"the encoder failed: {type(error).__name__}"))

    def _count(self, step: Sequence[Piece], seconds: float) -> None:
        tokens = sum(len(piece.row) for piece in step)
        self._began = None
        self._counts["steps"] += 1
        self._counts["rows"] += len(step)
        self._counts["prompt_tokens"] += tokens
        self._counts["busy_s"] += seconds
        self._speed = smoothed(self._speed, tokens, seconds)

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
