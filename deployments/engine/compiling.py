"""Requests whose constraint rank 0 has yet to compile: they wait here, so that the steps of others don't wait for them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from deployments.engine.messages import Request
from deployments.engine.structured import Grammars

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Compiling:
    """One thread beside the loop, one constraint after the other. llguidance lets go of the GIL while it works."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._waiting: dict[int, tuple[Request, Future[LLMatcher | None]]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> bool:
        """Whether the request waits here now. One without a constraint, or with one that is there, can be worked on at once."""
        constraint = request.sampling.constraint
        if constraint is None or self._grammars.has(constraint):
            return False
        self._waiting[request.id] = request, self._thread.submit(self._grammars.compile, constraint)
        return True

    def forget(self, request_id: int) -> bool:
        """Nobody waits for this request any more; whether it was here."""
        _, compiled = self._waiting.pop(request_id, (None, None))
        return compiled is not None and (compiled.cancel() or True)

    def ready(self) -> list[Request]:
        """Those that the engine can have now, in the order in which they came. Raises what reading the vocabulary raised."""
        found = [(request, compiled) for request, compiled in self._waiting.values() if compiled.done()]
        for request, compiled in found:
            del self._waiting[request.id]
            assert request.sampling.constraint
            self._grammars.keep(request.sampling.constraint, compiled.result())
        return [request for request, _ in found]

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
