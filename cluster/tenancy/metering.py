"""A server's way to the ledger: an `async with` around a request reserves before it, keeps its progress and settles its end.

`Ledger.reap` must be called three times in a lease, as long as the server lives: it says so, and settles what dead ones left. Knows
no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from cluster.errors import Conflict, LedgerUnavailable, PlatformError, ReplicaLost
from cluster.tenancy.books import Along, Progress, Reserve, Settle, Settled
from cluster.tenancy.group_commit import Done, GroupCommit
from cluster.tenancy.ledger import Ledger, reservation
from cluster.tenancy.metered import NOTHING, Metered, Outcome, Service
from cluster.types import Principal, Usage

logger = logging.getLogger(__name__)

PROGRESS_TOKENS = 32
PROGRESS_S = 1.0
"""How much of a stream a dead server may leave unbilled: whichever comes first."""


class Running:
    """A request under way. `outcome` is what its work says of the end; None: the end of the `async with` says it."""

    def __init__(self, group: GroupCommit, request_id: str, clock: Callable[[], float]) -> None:
        self.request_id = request_id
        self.outcome: Outcome | None = None
        self.metered = NOTHING
        self.settled: Settled | None = None  # once it is
        self._group = group
        self._clock = clock
        self._told, self._told_at = 0, clock()
        self._telling: asyncio.Task[Settled | None] | None = None

    def used(self, usage: Usage | Metered) -> None:
        """All that is used so far, durable soon. Raises Conflict when others have settled the request: then its work must stop."""
        self.metered = Metered.of(usage)
        if self._telling is not None:
            if not self._telling.done():
                return
            self._heard(self._telling)
        now = self._clock()
        if self.metered.output_tokens - self._told >= PROGRESS_TOKENS or now - self._told_at >= PROGRESS_S:
            self._told, self._told_at = self.metered.output_tokens, now
            self._telling = asyncio.ensure_future(self._group.do(Progress(self.request_id, self.metered)))

    def _heard(self, telling: asyncio.Task[Settled | None]) -> None:
        self._telling = None
        if isinstance(error := telling.exception(), Conflict):
            raise error
        if error is not None:
            logger.warning("progress was not kept", extra={"request_id": self.request_id, "reason": str(error)})

    async def settle(self, along: Along | None = None) -> None:
        """Once, when `outcome` is known, and to the end even if the caller is cancelled. `along` is written with it or not at all.
        What can't be written now is tried again: this returns."""
        if self._telling is not None:
            self._telling.add_done_callback(_seen)
        assert self.outcome is not None, "a request ends somehow"
        try:
            self.settled = await asyncio.shield(self._group.persist(Settle(self.request_id, self.metered, self.outcome, along)))
        except LedgerUnavailable:
            logger.critical("a request could not be settled yet", extra={"request_id": self.request_id})


Later = Callable[[Running], None]
"""Takes a request whose work is over, and settles it."""


class Metering:
    """One for a server's event loop. `clock` is monotonic, in seconds."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float] = time.monotonic, group: GroupCommit | None = None) -> None:
        self._clock = clock
        self._group = group or GroupCommit(ledger.apply)

    @asynccontextmanager
    async def request(
        self,
        principal: Principal,
        request_id: str,
        model: str,
        worst: int | Metered,
        operation: Service = "completions",
        *,
        later: Later | None = None,
    ) -> AsyncIterator[Running]:
        """Raises BudgetExceeded before the body has run. The body calls `Running.used`. It is settled at the end, or by `later`."""
        running = Running(self._group, request_id, self._clock)
        await self._reserve(running, reservation(principal, request_id, model, worst, operation))
        outcome: Outcome = "finished"
        try:
            yield running
        except BaseException as error:
            outcome = outcome_of(error)
            raise
        finally:
            running.outcome = running.outcome or outcome
            if later is None:
                await running.settle()
            else:
                later(running)

    async def close(self) -> None:
        await self._group.close()

    async def _reserve(self, running: Running, asked: Reserve) -> None:
        """Whoever leaves meanwhile, or doesn't hear what became of it, gives it back: it may have been written, or will be."""
        try:
            await self._group.do(asked)
        except (asyncio.CancelledError, LedgerUnavailable) as error:
            given_back = self._group.persist(Settle(running.request_id, NOTHING, outcome_of(error)))
            if isinstance(error, asyncio.CancelledError):
                await asyncio.wait({given_back})
            raise


def outcome_of(error: BaseException) -> Outcome:
    """How a request ended that ended by this."""
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        return "client_gone"
    if isinstance(error, ReplicaLost):
        return "replica_lost"
    return "cancelled" if isinstance(error, PlatformError) and error.status < 500 else "failed"


def _seen(telling: Done) -> None:
    if not telling.cancelled():
        telling.exception()
