"""Who waits for a place in the batch, and whose turn it is. A flow is what one tenant wants in one class of service.

Within a flow: first come, first served. Between the flows of a class: least served first. Between the classes: `interactive`,
except while `batch` has had less than its share. `fairness.py` has the counters; blocks and budgets are the scheduler's business.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cluster.types import Priority
from deployments.engine.fairness import BATCH_PRICE, OUTPUT, Account, Ledger, prompt_cost
from deployments.engine.sequence import Sequence

REMEMBERED = 1024
"""Flows without work whose debt is remembered, at most, in each class."""


@dataclass(slots=True, eq=False)
class Class(Account):
    """One class of service, with its flows."""

    flows: dict[bytes, Flow] = field(default_factory=dict)  # by tenant
    ledger: Ledger[Flow] = field(default_factory=Ledger)
    idle: dict[bytes, Flow] = field(default_factory=dict)  # those of them that have no work
    num_waiting: int = 0

    @property
    def is_idle(self) -> bool:
        return len(self.idle) == len(self.flows)

    def forget(self) -> None:
        """Keep at most half as many idle flows as may be. Whose debt is forgotten must not gain by it: the floor rises."""
        kept = [flow for flow in self.idle.values() if not self.ledger.is_level(flow)]
        kept.sort(key=lambda flow: flow.served)
        for flow in kept[: -(REMEMBERED // 2)]:
            self.ledger.floor = max(self.ledger.floor, flow.served)
        kept = kept[-(REMEMBERED // 2) :]
        for tenant in self.idle.keys() - {flow.tenant for flow in kept}:
            del self.flows[tenant], self.idle[tenant]


@dataclass(slots=True, eq=False)
class Flow(Account):
    """What one tenant wants in one class."""

    tenant: bytes = b""
    service: Class = field(default_factory=Class)
    waiting: OrderedDict[Sequence, None] = field(default_factory=OrderedDict)
    num_running: int = 0

    def pay(self, cost: float) -> None:
        self.served += cost * self.price
        self.service.served += cost * self.service.price


class Flows:
    """Every sequence that waits, and the account of whoever waits or runs."""

    def __init__(self) -> None:
        self.interactive = Class()
        self.batch = Class(BATCH_PRICE)
        self._classes: Ledger[Class] = Ledger()

    def __len__(self) -> int:
        return self.interactive.num_waiting + self.batch.num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """Everything that waits, those whose turn comes sooner before the others of their flow."""
        return (sequence for service in self._in_order() for flow in service.ledger.order() for sequence in flow.waiting)

    def add(self, sequence: Sequence) -> None:
        """At the end of its flow."""
        flow = self._flow(sequence)
        if not flow.waiting:
            if not flow.service.num_waiting:
                self._classes.begin(flow.service)
            flow.service.ledger.begin(flow)
        flow.waiting[sequence] = None
        flow.service.num_waiting += 1

    def put_back(self, sequence: Sequence, flow: Flow) -> None:
        """Preempted: at the front of its flow, with the claim that it had."""
        flow.num_running -= 1
        flow.waiting[sequence] = None
        flow.waiting.move_to_end(sequence, last=False)
        flow.service.num_waiting += 1
        flow.service.ledger.resume(flow)
        self._classes.resume(flow.service)

    def start(self, sequence: Sequence, flow: Flow) -> None:
        """It runs from now on. Its prompt is paid at once, so that a flow can't take all places before its counter moves."""
        sequence.is_guest = flow.service is self.batch and not (self.interactive.num_waiting and self._is_batch_first)
        self._classes.choose()
        flow.service.ledger.choose()
        self._take_out(sequence, flow)
        flow.num_running += 1
        flow.pay(self.price(sequence))
        sequence.num_paid = max(sequence.num_paid, sequence.num_prompt)

    def discard(self, sequence: Sequence) -> None:
        """It wants nothing any more. Nothing happens when it isn't among those who wait."""
        flow = self._class(sequence.priority).flows.get(sequence.tenant)
        if flow is not None and sequence in flow.waiting:
            self._take_out(sequence, flow)
            self._rest(flow)

    def stop(self, flow: Flow) -> None:
        """One that ran has ended."""
        flow.num_running -= 1
        self._rest(flow)

    def price(self, sequence: Sequence) -> float:
        """What it has to pay for a place: its prompt, the first time."""
        return 0.0 if sequence.num_paid else prompt_cost(sequence.num_prompt, sequence.num_cached)

    def charge(self, sequence: Sequence, flow: Flow) -> None:
        """For the output tokens that were computed since it paid last; what a preemption made it compute again is free."""
        flow.pay(OUTPUT * (sequence.num_computed - sequence.num_paid))
        sequence.num_paid = sequence.num_computed

    def turns(self) -> Iterator[Flow]:
        """The flows that wait, in the order in which they may take a place."""
        return (flow for service in self._in_order() for flow in service.ledger.order())

    def is_entitled(self, flow: Flow) -> bool:
        """Whether it isn't in the way of a class with a greater claim."""
        return flow.service is self.interactive or not self.interactive.num_waiting or self._is_batch_first

    def may_displace(self, flow: Flow, cost: float, other: Flow, is_guest: bool) -> bool:
        """Whether `flow`, whose turn it is, may take what a running sequence of `other` holds when it costs so much, computing that
        one again included: within a class if `flow` stays the one that had less even then, or else they would go on displacing
        each other; `interactive` may take the place of a guest, unless `batch` has had less than its share."""
        if flow.service is other.service:
            return flow.served + cost * flow.price < other.served
        return flow.service is self.interactive and is_guest and not self._is_batch_first

    def claim(self, sequence: Sequence, flow: Flow) -> tuple[bool, bool, float, int]:
        """By which running sequences are preempted, the largest first: the class that is behind, and of it guests, the tenant that
        had most, the newest."""
        return (flow.service is self.batch) is not self._is_batch_first, sequence.is_guest, flow.served, sequence.arrival

    def check_integrity(self, running: Iterable[Flow]) -> None:
        """Raises AssertionError when a count is wrong or an account lost."""
        known = [flow for service in (self.interactive, self.batch) for flow in service.flows.values()]
        assert len(self) == sum(len(flow.waiting) for flow in known), "the number of those who wait is wrong"
        assert sum(flow.num_running for flow in known) == len(list(running)), "the number of those who run is wrong"
        assert {id(flow) for flow in self.turns()} == {id(flow) for flow in known if flow.waiting}, "a flow waits in vain"
        for service in (self.interactive, self.batch):
            assert len(service.idle) <= REMEMBERED, "more idle flows than may be"
            assert all(not flow.waiting and not flow.num_running for flow in service.idle.values()), "an idle flow has work"

    @property
    def _is_batch_first(self) -> bool:
        return self.batch.served < self.interactive.served

    def _in_order(self) -> list[Class]:
        return [self.batch, self.interactive] if self._is_batch_first else [self.interactive, self.batch]

    def _class(self, priority: Priority) -> Class:
        return self.batch if priority == "batch" else self.interactive

    def _flow(self, sequence: Sequence) -> Flow:
        service = self._class(sequence.priority)
        flow = service.flows.get(sequence.tenant)
        if flow is None:
            flow = service.flows[sequence.tenant] = Flow(tenant=sequence.tenant, service=service)
        service.idle.pop(sequence.tenant, None)
        return flow

    def _take_out(self, sequence: Sequence, flow: Flow) -> None:
        del flow.waiting[sequence]
        flow.service.num_waiting -= 1
        if not flow.waiting:
            flow.service.ledger.end(flow)
            if not flow.service.num_waiting:
                self._classes.end(flow.service)

    def _rest(self, flow: Flow) -> None:
        """Remember a flow without work only while it has had more than others could still get."""
        if flow.waiting or flow.num_running:
            return
        service = flow.service
        if service.ledger.is_level(flow):
            del service.flows[flow.tenant]
        else:
            service.idle[flow.tenant] = flow
        if self.interactive.is_idle and self.batch.is_idle:
            self.__init__()  # type: ignore[misc]  # whoever comes next competes with nobody
        elif len(service.idle) > REMEMBERED:
            service.forget()
