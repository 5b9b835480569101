"""The ledger's rules, without a database: what reserve, progress, settle and reap do to balances, and what is written of it.

`Books` holds what one transaction has loaded, applies operations to it in order and gathers what must be written. An operation
either raises before it changed anything or is applied whole, so that one caller's refusal leaves the others of a group alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.errors import BudgetExceeded, Conflict, InvalidRequest, NotFound
from cluster.tenancy import money, postings, rating
from cluster.tenancy.budgets import Balance, Budget, passed, scope
from cluster.tenancy.metered import NOTHING, Metered, Outcome, Service, billable
from cluster.tenancy.postings import Entry, Kind, Posting
from cluster.tenancy.prices import Changes
from cluster.tenancy.rating import Counter, Item, PriceList

_ADJECTIVE = {"day": "daily", "month": "monthly", "total": "total"}


@dataclass(frozen=True, slots=True)
class Reserve:
    """Before any work. `worst`: micro-units, or the most that can be metered, which is then priced by the version in force."""

    request_id: str
    organization: str
    project: str
    key_id: str
    model: str
    worst: int | Metered
    operation: Service = "completions"


@dataclass(frozen=True, slots=True)
class Progress:
    """So much is used by now: what a reaper would settle."""

    request_id: str
    metered: Metered


Along = Callable[[Any], object]
"""Something that is written in the transaction of an operation, with its connection."""


@dataclass(frozen=True, slots=True)
class Settle:
    """After the work, however it ended. `along` is written with it, also where the request was settled before."""

    request_id: str
    metered: Metered
    outcome: Outcome
    along: Along | None = None


@dataclass(frozen=True, slots=True)
class Reap:
    """Close a reservation whose owner is gone, at its last progress."""

    request_id: str


Operation = Reserve | Progress | Settle | Reap


@dataclass(frozen=True, slots=True)
class Hold:
    """An open reservation, with what was used of it so far. `owner` works on it."""

    request_id: str
    organization: str
    project: str
    key_id: str
    model: str
    price: int
    worst: int
    opened_at: float
    owner: str
    operation: Service = "completions"
    metered: Metered = NOTHING

    @property
    def scopes(self) -> tuple[str, str, str]:
        return scope("organization", self.organization), scope("project", self.project), scope("key", self.key_id)


@dataclass(frozen=True, slots=True)
class Used:
    """A settled request, for usage reports and replays: one for each, forever."""

    hold: Hold
    seq: int
    metered: Metered  # what is charged
    outcome: Outcome
    booked_at: float
    amount: int


@dataclass(frozen=True, slots=True)
class Settled:
    """What a request cost. `first` is False when it had been settled before: then nothing was changed."""

    amount: int
    first: bool


@dataclass(slots=True)
class Books:
    """One transaction's view. `closed` has the amounts of requests that are settled already; `orphans` are open ones whose owner
    has given no sign of life."""

    now: float
    owner: str
    balances: dict[str, Balance]
    budgets: Mapping[str, list[Budget]]
    holds: dict[str, Hold]
    closed: dict[str, int]
    orphans: frozenset[str]
    changes: Changes
    prices: Mapping[int, PriceList]
    counters: dict[str, dict[Counter, int]]  # by organization: all of the windows that are open now
    postings: list[Posting] = field(default_factory=list)
    used: list[Used] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)  # scopes whose balance changed
    counted: set[tuple[str, Counter]] = field(default_factory=set)  # organization and counter of those that moved

    def apply(self, operation: Operation) -> Settled | None:
        """Raises BudgetExceeded, Conflict or NotFound, and has then changed nothing."""
        match operation:
            case Reserve():
                self._reserve(operation)
            case Progress():
                self._progress(operation)
            case Settle():
                return self._settle(operation)
            case Reap():
                return self._reap(operation)
        return None

    def booking_time(self, organization: str) -> float:
        return max(self.now, self.balances[scope("organization", organization)].booked_at)

    def _reserve(self, asked: Reserve) -> None:
        if asked.request_id in self.holds or asked.request_id in self.closed:
            raise Conflict(f"request {asked.request_id} is in the ledger already")
        at = self.booking_time(asked.organization)
        price = self.changes.version_at(asked.organization, at)
        prices = self.prices[price]
        worst = asked.worst if isinstance(asked.worst, int) else rating.at_most(prices, asked.model, asked.worst)
        if not 0 <= worst <= money.LARGEST:
            raise InvalidRequest(f"a request can't cost {worst} micro-units")
        who = asked.request_id, asked.organization, asked.project, asked.key_id
        hold = Hold(*who, asked.model, price, worst, at, self.owner, asked.operation)
        self._admit(hold, at, prices.currency)
        for name in hold.scopes:
            self.balances[name].held += worst
        self.touched.update(hold.scopes)
        self.holds[hold.request_id] = hold
        self._post(hold, "reserve", at, postings.moved(worst, postings.held(hold.project), postings.COMMITTED))

    def _admit(self, hold: Hold, at: float, currency: str) -> None:
        for name in hold.scopes:
            balance = self.balances[name]
            balance.reach(at)
            if limit := passed(balance, self.budgets.get(name, ()), hold.worst):
                whose = f"The {_ADJECTIVE[limit.period]} budget of this {name.partition(':')[0]}"
                raise BudgetExceeded(f"{whose} has no room for this request, which may cost {money.plain(hold.worst)} {currency}.")

    def _progress(self, report: Progress) -> None:
        hold = self._open(report.request_id)
        self.holds[hold.request_id] = replace(hold, metered=hold.metered.at_least(report.metered))

    def _open(self, request_id: str) -> Hold:
        if request_id in self.closed:
            raise Conflict(f"request {request_id} is settled: whoever works on it must stop")
        if request_id not in self.holds:
            raise NotFound(f"nothing is reserved for request {request_id}")
        return self.holds[request_id]

    def _settle(self, ended: Settle) -> Settled:
        if ended.request_id in self.closed:
            return Settled(self.closed[ended.request_id], first=False)
        return Settled(self._close(self._open(ended.request_id), ended.metered, ended.outcome), first=True)

    def _reap(self, asked: Reap) -> Settled | None:
        hold = self.holds.get(asked.request_id)
        if hold is None or hold.request_id not in self.orphans:
            return None
        return Settled(self._close(hold, hold.metered, "lost"), first=True)

    def _close(self, hold: Hold, metered: Metered, outcome: Outcome) -> int:
        """Give the reservation back and charge what was used, in one posting."""
        at = self.booking_time(hold.organization)
        charged = billable(metered, outcome)
        items = self._rated(hold, charged, at)
        amount = sum(item.amount for item in items)
        for name in hold.scopes:
            balance = self.balances[name]
            balance.reach(at)
            balance.held -= hold.worst
            balance.spend(amount)
        self.touched.update(hold.scopes)
        released = postings.moved(hold.worst, postings.COMMITTED, postings.held(hold.project))
        owed = (Entry(postings.receivable(hold.organization), amount),) if amount else ()
        seq = self._post(hold, "settle", at, (*released, *owed, *_revenue(hold, items)))
        self.used.append(Used(hold, seq, charged, outcome, at, amount))
        self.closed[hold.request_id] = amount
        del self.holds[hold.request_id]
        return amount

    def _rated(self, hold: Hold, metered: Metered, at: float) -> list[Item]:
        counters = self.counters.setdefault(hold.organization, {})
        items = rating.rate(self.prices[hold.price], counters, hold.model, metered, at)
        rating.count(counters, items)
        self.counted.update((hold.organization, item.counter) for item in items)
        return items

    def _post(self, hold: Hold, kind: Kind, at: float, entries: Iterable[Entry]) -> int:
        organization = self.balances[scope("organization", hold.organization)]
        organization.seq += 1
        organization.booked_at = at
        posting = Posting(hold.organization, organization.seq, hold.request_id, kind, hold.project, at, tuple(entries))
        self.postings.append(posting)
        return posting.seq


def _revenue(hold: Hold, items: Iterable[Item]) -> list[Entry]:
    """Also of what costs nothing: an invoice shows it."""
    return [Entry(postings.REVENUE, -item.amount, item.model, item.meter, item.quantity, hold.price) for item in items]
