"""Which rows are next: a pure policy over tenants, their calls and the calls' rows. Knows no model, no clock, no thread.

A row is anything with a length, which is what it costs: a text's tokens, a table's rows. Costs are called tokens here.

Least served first, twice (virtual token counters, `engine/fairness.py`): among tenants, and among the calls of one tenant, so that
a search isn't held up by the bulk indexing that the same key does. Within a call: first come, first served. A step's rows need not
be alike: whoever pads sorts them by length itself.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field

from deployments.engine.fairness import Account, Ledger

REMEMBERED = 1024
"""Tenants without work whose debt is remembered, at most."""


@dataclass(slots=True, eq=False)
class Call(Account):
    """The rows of one call that wait. `num_tokens` is what they have together."""

    tenant: bytes = b""
    rows: deque[tuple[int, Sized]] = field(default_factory=deque)  # with their places in the answer
    num_tokens: int = 0
    arrival: int = 0


@dataclass(slots=True, eq=False)
class Tenant(Account):
    calls: Ledger[Call] = field(default_factory=Ledger)
    waiting: dict[Call, None] = field(default_factory=dict)
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """One row of a step."""

    call: Call
    place: int
    row: Sized


class Lines:
    """Everything that waits. At most `limit` tokens, unless a single call has more."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.num_tokens = self.num_rows = 0
        self._tenants: dict[bytes, Tenant] = {}
        self._idle: OrderedDict[bytes, Tenant] = OrderedDict()
        self._ledger: Ledger[Tenant] = Ledger()
        self._arrivals = 0

    def make_room(self, tenant: bytes, num_tokens: int) -> list[Call] | None:
        """The calls that must go so that `num_tokens` of `tenant` find room, the newest of who has most; they are taken out. None:
        the newcomer itself would have most, and nothing is changed."""
        wanted = self.num_tokens + num_tokens - self.limit
        if wanted <= 0 or not self.num_tokens:
            return []
        held = {name: one.num_tokens for name, one in self._tenants.items()}
        mine = held.get(tenant, 0) + num_tokens
        calls = sorted((call for one in self._tenants.values() for call in one.waiting), key=lambda call: -call.arrival)
        leaving: list[Call] = []
        while wanted > 0:
            greediest = max(held, key=held.__getitem__)
            if greediest == tenant or held[greediest] <= mine:
                return None
            call = next(call for call in calls if call.tenant == greediest and call not in leaving)
            leaving.append(call)
            held[greediest] -= call.num_tokens
            wanted -= call.num_tokens
        for call in leaving:
            self.discard(call)
        return leaving

    def add(self, tenant: bytes, rows: Sequence[Sized]) -> Call:
        """A call with its rows at the end of the tenant's line."""
        self._arrivals += 1
        num_tokens = sum(len(row) for row in rows)
        call = Call(tenant=tenant, rows=deque(enumerate(rows)), num_tokens=num_tokens, arrival=self._arrivals)
        line = self._tenants.get(tenant)
        if line is None:
            line = self._tenants[tenant] = self._idle.pop(tenant) if tenant in self._idle else Tenant()
            self._ledger.begin(line)
        line.waiting[call] = None
        line.calls.begin(call)
        line.num_tokens += num_tokens
        self.num_tokens += num_tokens
        self.num_rows += len(rows)
        return call

    def take(self, budget: int) -> list[Piece]:
        """The next step: at most `budget` tokens, or one row that has more. Each is paid for at once."""
        step: list[Piece] = []
        while self.num_rows:
            line = self._ledger.first()
            call = line.calls.first()
            place, row = call.rows[0]
            if step and budget < len(row):
                break
            self._ledger.choose()
            line.calls.choose()
            call.rows.popleft()
            step.append(Piece(call, place, row))
            budget -= len(row)
            line.served += len(row)
            call.served += len(row)
            self._count(line, call, len(row), 1)
            if not call.rows:
                self._end(line, call)
        return step

    def discard(self, call: Call) -> None:
        """Its rows that still wait are not wanted any more."""
        if call.rows:
            line = self._tenants[call.tenant]
            self._count(line, call, call.num_tokens, len(call.rows))
            call.rows.clear()
            self._end(line, call)

    def _count(self, line: Tenant, call: Call, tokens: int, rows: int) -> None:
        call.num_tokens -= tokens
        line.num_tokens -= tokens
        self.num_tokens -= tokens
        self.num_rows -= rows

    def _end(self, line: Tenant, call: Call) -> None:
        """Nothing of `call` waits any more; perhaps nothing of its tenant does."""
        line.calls.end(call)
        del line.waiting[call]
        if line.waiting:
            return
        self._ledger.end(line)
        del self._tenants[call.tenant]
        if not self._tenants:
            self._idle.clear()  # whoever comes next competes with nobody
            self._ledger = Ledger()
        elif not self._ledger.is_level(line):
            self._idle[call.tenant] = line
            if len(self._idle) > REMEMBERED:
                _, forgotten = self._idle.popitem(last=False)
                self._ledger.floor = max(self._ledger.floor, forgotten.served)
