"""The ledger against a model of a few dictionaries, under random histories: two processes, crashes, clocks that go back."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from cluster.errors import BudgetExceeded, Conflict, PlatformError
from cluster.store import Store, metadata
from cluster.tenancy.books import Operation, Progress, Reserve, Settle, Settled
from cluster.tenancy.budgets import Budgets
from cluster.tenancy.ledger import Ledger
from cluster.tenancy.metered import OURS, Metered, Outcome
from cluster.tenancy.periods import day_of, month_of
from cluster.tenancy.rating import PriceList
from cluster.tenancy.reconcile import problems
from tests.cluster.tenancy.conftest import Clock

PROJECTS = {"web": "acme", "api": "acme", "lab": "umbrella"}
TOKENS = st.integers(0, 40)
OUTCOMES: st.SearchStrategy[Outcome] = st.sampled_from(["finished", "length", "cancelled", "client_gone", "replica_lost", "failed"])
FREE_A_DAY, PER_REQUEST, PER_TOKEN = 3, 10, 5


@dataclass
class Open:
    project: str
    owner: int
    worst: int
    progress: int = 0


class LedgerMachine(RuleBasedStateMachine):
    """Requests cost 5 for a token, and 10 each from an organization's fourth of a day on."""

    requests: Bundle[str] = Bundle("requests")

    @initialize()
    def begin(self) -> None:
        self.store = Store("sqlite://")
        metadata.create_all(self.store.engine)
        self.clock = Clock()
        self.begun = self.clock.now
        self.monotonic = Clock(0.0)
        self.ledgers = [Ledger(self.store, self.clock, monotonic=self.monotonic) for _ in range(2)]
        self.ledgers[0].prices.publish("default", prices(PER_TOKEN))
        self.budgets = Budgets(self.store)
        self.limits: dict[tuple[str, str], int] = {}
        self.open: dict[str, Open] = {}
        self.closed: dict[str, int] = {}
        self.spent: list[tuple[str, int, int, int]] = []  # project, day, month, amount
        self.latest = dict.fromkeys(PROJECTS.values(), 0.0)
        self.counted: dict[tuple[str, int], int] = {}
        self.beats, self.beat_at = [0, 0], [-1e9, -1e9]
        self.heard: dict[int, tuple[int, float]] = {}
        self.made = 0

    def teardown(self) -> None:
        if hasattr(self, "store"):
            assert problems(self.store) == []
            self.store.close()

    @rule(target=requests, project=st.sampled_from(sorted(PROJECTS)), tokens=TOKENS, owner=st.integers(0, 1))
    def reserve(self, project: str, tokens: int, owner: int) -> str:
        self.made += 1
        request_id = f"r{self.made}"
        allowed = self.expect(project, worst := tokens * PER_TOKEN + PER_REQUEST)
        result = self.apply(
            owner, Reserve(request_id, PROJECTS[project], project, f"key-{project}", "chat", Metered(output_tokens=tokens))
        )
        if allowed:
            assert result is None, result
            self.open[request_id] = Open(project, owner, worst)
        else:
            assert isinstance(result, BudgetExceeded)
        return request_id

    @rule(target=requests, sizes=st.lists(TOKENS, min_size=2, max_size=5), outcome=OUTCOMES)
    def whole_requests_in_one_group(self, sizes: list[int], outcome: Outcome) -> object:
        """Reserved and settled within one transaction, beside each other."""
        names = [f"r{self.made + 1 + number}" for number in range(len(sizes))]
        self.made += len(sizes)
        operations: list[Operation] = []
        for name, tokens in zip(names, sizes, strict=True):
            operations.append(Reserve(name, "umbrella", "lab", "key-lab", "chat", Metered(output_tokens=40)))
            operations.append(Settle(name, Metered(output_tokens=tokens), outcome))
        results = self.group(0, operations)
        for name, tokens, reserved, settled in zip(names, sizes, results[::2], results[1::2], strict=True):
            if self.expect("lab", 40 * PER_TOKEN + PER_REQUEST):
                assert reserved is None
                self.open[name] = Open("lab", 0, 40 * PER_TOKEN + PER_REQUEST)
                assert settled == Settled(self.close(name, tokens, outcome), first=True)
            else:
                assert isinstance(reserved, BudgetExceeded)
                assert isinstance(settled, PlatformError)
        return multiple(*names)

    @rule(request=requests, tokens=TOKENS)
    def progress(self, request: str, tokens: int) -> None:
        """As far as was reserved: nothing that runs passes its bound."""
        if request in self.open:
            tokens = min(tokens, (self.open[request].worst - PER_REQUEST) // PER_TOKEN)
        result = self.apply(0, Progress(request, Metered(output_tokens=tokens)))
        if request in self.open:
            assert result is None
            self.open[request].progress = max(self.open[request].progress, tokens)
        else:
            assert isinstance(result, PlatformError)
            assert isinstance(result, Conflict) == (request in self.closed)

    @rule(request=requests, share=st.floats(0, 1), outcome=OUTCOMES, owner=st.integers(0, 1))
    def settle(self, request: str, share: float, outcome: Outcome, owner: int) -> None:
        most = (self.open[request].worst - PER_REQUEST) // PER_TOKEN if request in self.open else 40
        tokens = int(most * share)
        result = self.apply(owner, Settle(request, Metered(output_tokens=tokens), outcome))
        if request in self.open:
            assert result == Settled(self.close(request, tokens, outcome), first=True)
        elif request in self.closed:
            assert result == Settled(self.closed[request], first=False)
        else:
            assert isinstance(result, PlatformError)

    @rule(seconds=st.sampled_from([0.5, 3.0, 9.0, 3600.0, 86_400.0, 20 * 86_400.0, -30.0, -86_400.0]))
    def time_passes(self, seconds: float) -> None:
        self.monotonic.now += max(0.0, seconds)
        self.clock.now = max(self.begun, self.clock.now + seconds)  # earlier there were no prices

    @rule(owner=st.integers(0, 1))
    def renew(self, owner: int) -> None:
        self.ledgers[owner].renew()
        self.beat(owner)

    def beat(self, owner: int) -> None:
        self.beats[owner] += 1
        self.beat_at[owner] = self.monotonic.now

    @rule()
    def reap(self) -> None:
        if self.beats[1]:
            self.beat(1)
        silent = set()
        for owner in {hold.owner for hold in self.open.values()}:
            if self.heard.get(owner, (0, 0.0))[0] != self.beats[owner]:
                self.heard[owner] = self.beats[owner], self.monotonic.now
            elif self.monotonic.now - self.heard[owner][1] >= self.ledgers[1].lease_s:
                silent.add(owner)
        for owner in {0, 1} - {hold.owner for hold in self.open.values()}:
            self.heard.pop(owner, None)  # nothing of it is open: not listened to
        dead = [name for name, hold in self.open.items() if hold.owner in silent or self.opened_long_ago(name)]
        before = len(self.closed)
        assert self.ledgers[1].reap() == len(dead)
        for name in self.reaped_in_order(dead):
            self.close(name, self.open[name].progress, "lost")
        assert len(self.closed) == before + len(dead)

    def opened_long_ago(self, name: str) -> bool:
        return self.opened[name] < self.clock.now - self.ledgers[0].longest_s

    def reaped_in_order(self, names: list[str]) -> list[str]:
        return sorted(names, key=lambda name: (self.opened[name], name))

    @property
    def opened(self) -> dict[str, float]:
        if not hasattr(self, "_opened"):
            self._opened: dict[str, float] = {}
        return self._opened

    @rule(scope=st.sampled_from([("project", "web"), ("organization", "acme"), ("key", "key-lab")]), limit=st.integers(0, 900),
          period=st.sampled_from(["day", "month", "total"]))  # fmt: skip
    def limit(self, scope: tuple[str, str], limit: int, period: str) -> None:
        self.budgets.set(*scope, period, limit)  # type: ignore[arg-type]
        self.limits[":".join(scope), period] = limit

    @invariant()
    def balances_are_the_models(self) -> None:
        if not hasattr(self, "store"):
            return
        for project, organization in PROJECTS.items():
            for kind, name, members in (
                ("project", project, {project}),
                ("organization", organization, self.members(organization)),
            ):
                balance = self.budgets.balance(kind, name, self.latest[organization])  # type: ignore[arg-type]
                assert balance.held == sum(hold.worst for hold in self.open.values() if hold.project in members)
                assert balance.spent == sum(amount for of, _, _, amount in self.spent if of in members)

    def members(self, organization: str) -> set[str]:
        return {project for project, of in PROJECTS.items() if of == organization}

    def expect(self, project: str, worst: int) -> bool:
        """Whether every limit has room for it now."""
        organization = PROJECTS[project]
        at = max(self.clock.now, self.latest[organization])
        for (scope, period), limit in self.limits.items():
            kind, _, name = scope.partition(":")
            members = {"project": {name}, "organization": self.members(name), "key": {name.removeprefix("key-")}}[kind]
            if project not in members:
                continue
            spent = sum(
                amount
                for of, day, month, amount in self.spent
                if of in members and (period == "total" or (day == day_of(at) if period == "day" else month == month_of(at)))
            )
            held = sum(hold.worst for hold in self.open.values() if hold.project in members)
            if spent + held + worst > limit:
                return False
        return True

    def close(self, request: str, tokens: int, outcome: Outcome) -> int:
        hold = self.open.pop(request)
        organization = PROJECTS[hold.project]
        at = max(self.clock.now, self.latest[organization])
        amount = 0
        if tokens or outcome not in OURS:
            count = self.counted[organization, day_of(at)] = self.counted.get((organization, day_of(at)), 0) + 1
            amount = tokens * PER_TOKEN + PER_REQUEST * (count > FREE_A_DAY)
        assert amount <= hold.worst
        self.latest[organization] = at
        self.spent.append((hold.project, day_of(at), month_of(at), amount))
        self.closed[request] = amount
        return amount

    def apply(self, owner: int, operation: Operation) -> Settled | PlatformError | None:
        return self.group(owner, [operation])[0]

    def group(self, owner: int, operations: list[Operation]) -> list[Settled | PlatformError | None]:
        ledger = self.ledgers[owner]
        due = self.monotonic.now - self.beat_at[owner] > ledger.lease_s / 3
        if due and any(isinstance(operation, Reserve) for operation in operations):
            self.beat(owner)
        results = ledger.apply(operations)
        for operation, result in zip(operations, results, strict=True):
            if isinstance(operation, Reserve) and result is None:
                at = max(self.clock.now, self.latest[operation.organization])
                self.latest[operation.organization] = self.opened[operation.request_id] = at
        return results


def prices(per_token: int) -> PriceList:
    tiers = [{"up_to": FREE_A_DAY, "price": "0"}, {"price": f"0.{PER_REQUEST:06}"}]
    requests = {"meter": "requests", "window": "day", "tiers": tiers}
    return PriceList.model_validate({"charges": [requests, {"meter": "output_tokens", "price": f"0.{per_token:06}"}]})


LedgerMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestLedger = pytest.mark.filterwarnings("ignore::ResourceWarning")(LedgerMachine.TestCase)
