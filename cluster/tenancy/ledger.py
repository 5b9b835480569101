"""The ledger: what every request may cost is reserved before work, and what it did cost is settled exactly once after it.

`reserve` raises BudgetExceeded or returns; from then on the reservation is open until `settle`, however the request ends. The
process that works on it calls `renew` (once for all of its requests) more often than `lease_s`; if it dies, `reap`, called by
anybody, settles what it left open at its last `progress`. A call returns when its facts are durable, and not before.

The methods are synchronous, and may be called from many threads and processes. A server uses `GroupCommit` instead, which puts
operations of many callers into one transaction. Knows nothing of models and HTTP.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence

import sqlalchemy as sa

from cluster.errors import Conflict, LedgerUnavailable, PlatformError
from cluster.store import Store
from cluster.tenancy import journal, rating
from cluster.tenancy.books import Books, Operation, Progress, Reap, Reserve, Settle, Settled
from cluster.tenancy.budgets import Balance, scope
from cluster.tenancy.metered import Metered, Outcome, Service
from cluster.tenancy.prices import Prices
from cluster.types import Principal, Usage

logger = logging.getLogger(__name__)

Result = Settled | PlatformError | None

Scopes = tuple[str, str, str]
"""An organization, its project and the key."""

_REAPED_AT_ONCE = 100


class Ledger:
    """`lease_s`: how long an owner is believed to live without a sign; `longest_s`: no request takes longer, and what is open for
    more was forgotten. Both in seconds."""

    def __init__(
        self,
        store: Store,
        clock: Callable[[], float] = time.time,
        lease_s: float = 8.0,
        longest_s: float = 90_000.0,
        owner: str | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._clock, self._monotonic = clock, monotonic
        self.lease_s, self.longest_s = lease_s, longest_s
        self.owner = owner or secrets.token_hex(8)
        self.prices = Prices(store, clock)
        self._known = set[str]()  # scopes that have a balance
        self._reserved = dict[str, Scopes]()  # of open requests that were reserved here; they never change
        self._renewed_at = float("-inf")  # monotonic
        self._heard = dict[str, tuple[int, float]]()  # of owners: the last beat, and since when it is the last (monotonic)
        self._silent = dict[str, int]()  # of those who gave no sign for a whole lease: their last beat
        self._broken = False

    def reserve(
        self, principal: Principal, request_id: str, model: str, worst: int | Metered, operation: Service = "completions"
    ) -> None:
        """`worst`: micro-units, or a bound of what can be metered. Raises BudgetExceeded, and Conflict for a known request."""
        self._one(reservation(principal, request_id, model, worst, operation))

    def progress(self, request_id: str, usage: Usage | Metered) -> None:
        """Make durable what is used so far. Raises Conflict when the request is settled (then stop working on it), or NotFound."""
        self._one(Progress(request_id, Metered.of(usage)))

    def settle(self, request_id: str, usage: Usage | Metered | None, outcome: Outcome) -> Settled:
        """Charge what was used and free the rest. Again: changes nothing and says so. Raises NotFound without a reservation."""
        settled = self._one(Settle(request_id, Metered.of(usage), outcome))
        assert settled is not None
        return settled

    def renew(self) -> None:
        """Say that the owner of this ledger's reservations lives."""
        with self._store.begin() as connection:
            journal.renew(connection, self.owner)
        self._renewed_at = self._monotonic()

    def reap(self, now: float | None = None) -> int:
        """Settle reservations whose owners are gone; returns how many. Any process may do so at any time.

        An owner is gone when this ledger has looked at it twice, `lease_s` apart or more, and heard nothing between.
        """
        if self._renewed_at > float("-inf"):
            self.renew()
        at, closed = self._clock() if now is None else now, 0
        self._listen()
        while ids := self._orphans(at):
            settled = [result for result in self.apply([Reap(request_id) for request_id in ids], at) if isinstance(result, Settled)]
            closed += len(settled)
            if len(settled) < len(ids):
                break  # somebody else is at it, or an owner has come back
        if closed:
            logger.warning("reservations without an owner were settled", extra={"count": closed})
        return closed

    def _listen(self) -> None:
        now = self._monotonic()
        with self._store.read() as connection:
            beats = journal.beats(connection)
        last = self._heard
        self._heard = {owner: last[owner] if last.get(owner, (0,))[0] == beat else (beat, now) for owner, beat in beats.items()}
        self._silent = {owner: beat for owner, (beat, since) in self._heard.items() if now - since >= self.lease_s}

    def worst(self, principal: Principal, model: str, bound: Metered) -> int:
        """Micro-units that a request can't pass, by the prices in force now."""
        return rating.at_most(self.prices.at(principal.organization).prices, model, bound)

    def apply(self, operations: Sequence[Operation], now: float | None = None) -> list[Result]:
        """Apply operations in order, in one transaction; refusals stand in the place of their results.

        Raises LedgerUnavailable: for good, once the store may have lost what it said it had. Nothing more is booked then until a
        new process has read it afresh.
        """
        if self._broken:
            raise LedgerUnavailable("the ledger has stopped: its store failed to write")
        at = self._clock() if now is None else now
        try:
            return self._apply(operations, at)
        except sa.exc.IntegrityError:  # a request that another process has just booked
            return [self._alone(operation, at) for operation in operations]
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            self._broken = _is_fatal(error)
            logger.critical("the ledger's store failed", exc_info=True)
            raise LedgerUnavailable("the ledger's store failed to write") from None

    def _alone(self, operation: Operation, now: float) -> Result:
        try:
            return self._apply([operation], now)[0]
        except sa.exc.IntegrityError:
            return Conflict(f"request {operation.request_id} is in the ledger already")

    def _one(self, operation: Operation) -> Settled | None:
        [result] = self.apply([operation])
        if isinstance(result, PlatformError):
            raise result
        return result

    def _apply(self, operations: Sequence[Operation], now: float) -> list[Result]:
        self._create_balances(operations)
        due = self._monotonic() - self._renewed_at > self.lease_s / 3
        renews = due and any(isinstance(operation, Reserve) for operation in operations)
        known = _known(operations)
        with self._store.begin() as connection:
            locked = self._locked(connection, operations, known)
            settles = any(isinstance(operation, Settle | Reap) for operation in operations)
            books = journal.load(connection, self.prices, locked, known, now, self.owner, settles=settles)
            if reaped := [operation.request_id for operation in operations if isinstance(operation, Reap)]:
                found = journal.orphans(connection, self._silent, now - self.longest_s, len(reaped), among=reaped)
                books.orphans = frozenset(found)
            before = dict(books.holds)
            results = [_attempt(books, operation) for operation in operations]
            journal.write(connection, books, before)
            for operation in operations:
                if isinstance(operation, Settle) and operation.along is not None:
                    operation.along(connection)
            if renews:
                journal.renew(connection, self.owner)
        if renews:
            self._renewed_at = self._monotonic()
        self._remember(operations, results)
        return results

    def _remember(self, operations: Sequence[Operation], results: Sequence[Result]) -> None:
        for operation, result in zip(operations, results, strict=True):
            if isinstance(operation, Reserve) and result is None:
                self._reserved[operation.request_id] = scopes_of(operation)
            elif isinstance(operation, Settle | Reap):
                self._reserved.pop(operation.request_id, None)

    def _create_balances(self, operations: Sequence[Operation]) -> None:
        """In a transaction of its own: rows that are made while others are locked could make two writers wait for each other."""
        wanted = {name for operation in operations if isinstance(operation, Reserve) for name in scopes_of(operation)}
        if missing := wanted - self._known:
            with self._store.begin() as connection:
                journal.create(connection, missing)
            self._known |= missing

    def _locked(self, connection: sa.Connection, operations: Sequence[Operation], known: set[str]) -> dict[str, Balance]:
        scopes = [scopes_of(operation) for operation in operations if isinstance(operation, Reserve)]
        own = {request_id: found for request_id in known if (found := self._reserved.get(request_id))}
        scopes += own.values()
        if others := known - own.keys():
            scopes += journal.scopes_of(connection, others).values()
        return journal.lock(connection, {name for each in scopes for name in each})

    def _orphans(self, now: float) -> list[str]:
        with self._store.read() as connection:
            return journal.orphans(connection, self._silent, now - self.longest_s, _REAPED_AT_ONCE)


def reservation(
    principal: Principal, request_id: str, model: str, worst: int | Metered, operation: Service = "completions"
) -> Reserve:
    return Reserve(request_id, principal.organization, principal.tenant, principal.key_id, model, worst, operation)


def scopes_of(asked: Reserve) -> Scopes:
    return scope("organization", asked.organization), scope("project", asked.project), scope("key", asked.key_id)


def _known(operations: Sequence[Operation]) -> set[str]:
    """Requests that must have been reserved before these operations."""
    new = {operation.request_id for operation in operations if isinstance(operation, Reserve)}
    return {operation.request_id for operation in operations} - new


def _attempt(books: Books, operation: Operation) -> Result:
    try:
        return books.apply(operation)
    except PlatformError as refusal:
        return refusal


def _is_fatal(error: Exception) -> bool:
    """Whether a write or a sync failed. SQLite says `disk I/O error`; after one the kernel may take lost pages for clean, so a
    retry would seem to work. Postgres ends itself in that case, and recovers from its own log."""
    return any(words in str(error).lower() for words in ("disk i/o error", "malformed"))
