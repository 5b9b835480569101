"""A naive model of the policy between tenants and classes: lists, searched from end to end.

Slots and budget only; blocks are never short and nothing is cached.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from deployments.engine.scheduler import MAX_SHARES


@dataclass(eq=False)
class Job:
    number: int
    flow: tuple[str, str]  # class, tenant
    prompt: int
    output: int
    computed: int = 0
    sampled: int = 0
    is_paid: bool = False
    is_guest: bool = False

    @property
    def pending(self) -> int:
        return self.prompt + self.sampled - self.computed


@dataclass
class Model:
    """What the documents say, step by step."""

    slots: int
    budget: int
    waiting: list[Job] = field(default_factory=list)  # every flow's in its order
    running: list[Job] = field(default_factory=list)
    served: dict[object, float] = field(default_factory=lambda: defaultdict(float))  # of a flow, or of a class by its name
    since: dict[object, int] = field(default_factory=dict)  # when a flow began to wait
    floor: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by class; "": of the classes
    clock: int = 0

    def add(self, job: Job) -> None:
        kind, _ = job.flow
        for party, rivals, floor in (
            (kind, {other.flow[0] for other in self.waiting}, ""),
            (job.flow, {other.flow for other in self.waiting if other.flow[0] == kind}, kind),
        ):
            if party not in rivals:
                self.floor[floor] = max([self.floor[floor], *([min(self.served[rival] for rival in rivals)] if rivals else [])])
                self.served[party] = max(self.served[party], self.floor[floor])
                self.since[party] = self.tick()
        self.waiting.append(job)

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def turns_of_classes(self) -> list[str]:
        return sorted(("interactive", "batch"), key=lambda kind: self.served[kind])

    def turns(self) -> list[tuple[str, str]]:
        kinds = self.turns_of_classes()
        flows = {job.flow for job in self.waiting}
        return sorted(flows, key=lambda flow: (kinds.index(flow[0]), self.served[flow], self.since[flow]))

    def pay(self, job: Job, cost: float) -> None:
        self.served[job.flow] += cost
        self.served[job.flow[0]] += cost * (19 if job.flow[0] == "batch" else 1)

    def wanted(self) -> dict[tuple[str, str], int]:
        wanted: dict[tuple[str, str], int] = Counter()
        for job in self.running:
            if job.pending > 1:
                wanted[job.flow] += job.pending - 1
        return wanted

    def admit(self) -> None:
        while True:
            wanted = self.wanted()
            full = len(self.running) + sum(wanted.values()) >= self.budget
            flows = self.turns()
            if full:
                flows = [flow for flow in flows if flow not in wanted and len(wanted) < MAX_SHARES]
                if self.turns_of_classes()[0] == "interactive" and any(job.flow[0] == "interactive" for job in self.waiting):
                    flows = [flow for flow in flows if flow[0] == "interactive"]
            if not flows:
                return
            job = next(job for job in self.waiting if job.flow == flows[0])
            if len(self.running) == self.slots and not self.displace(job):
                return
            batch_is_first = self.turns_of_classes()[0] == "batch" and any(j.flow[0] == "interactive" for j in self.waiting)
            job.is_guest = job.flow[0] == "batch" and not batch_is_first
            for key, parties in (("", {j.flow[0] for j in self.waiting}), (job.flow[0], self.rivals(job))):
                self.floor[key] = max(self.floor[key], min(self.served[party] for party in parties))
            self.waiting.remove(job)
            self.running.append(job)
            if not job.is_paid:
                self.pay(job, job.prompt)
                job.is_paid = True

    def rivals(self, job: Job) -> set[tuple[str, str]]:
        return {other.flow for other in self.waiting if other.flow[0] == job.flow[0]}

    def displace(self, job: Job) -> bool:
        candidates, last = self.running[1:], self.turns_of_classes()[1]
        if not candidates:
            return False
        victim = max(candidates, key=lambda other: (other.flow[0] == last, other.is_guest, self.served[other.flow], other.number))
        if victim.flow[0] == job.flow[0]:
            cost = (0 if job.is_paid else job.prompt) + victim.prompt + victim.sampled
            if self.served[job.flow] + cost >= self.served[victim.flow]:
                return False
        elif job.flow[0] == "batch" or last == "interactive" or not victim.is_guest:
            return False
        self.running.remove(victim)
        victim.computed = 0
        if not any(other.flow == victim.flow for other in self.waiting):
            self.since[victim.flow] = self.tick()
        self.waiting.insert(next((i for i, o in enumerate(self.waiting) if o.flow == victim.flow), len(self.waiting)), victim)
        return True

    def share(self) -> dict[Job, int]:
        counts = dict.fromkeys(self.running, 1)
        left, wanted = self.budget - len(counts), self.wanted()
        batch = sum(num for flow, num in wanted.items() if flow[0] == "batch")
        interactive = sum(wanted.values()) - batch
        parts = {"batch": min(batch, max(left - interactive, left // 20))}
        parts["interactive"] = left - parts["batch"]
        for kind, part in parts.items():
            given = water({flow: num for flow, num in wanted.items() if flow[0] == kind}, part)
            for job in self.running:
                if job.flow in given and job.pending > 1:
                    more = min(job.pending - 1, given[job.flow])
                    given[job.flow] -= more
                    counts[job] += more
        return counts

    def step(self) -> dict[int, int]:
        self.admit()
        counts = self.share()
        for job, count in counts.items():
            before = job.computed
            job.computed += count
            if job.computed == job.prompt + job.sampled:
                job.sampled += 1
            paid = job.__dict__.setdefault("paid", job.prompt)
            if job.computed > paid:
                self.pay(job, 2 * (job.computed - max(paid, before)))
                job.__dict__["paid"] = job.computed
        self.running = [job for job in self.running if job.sampled < job.output]
        if not self.running and not self.waiting:
            self.served.clear()
            self.floor.clear()
        return {job.number: count for job, count in counts.items()}


def water(wanted: dict[tuple[str, str], int], budget: int) -> dict[tuple[str, str], int]:
    """Shares by rising water: the level at which the budget is used up; what rounding leaves goes to who wants most."""
    given: dict[tuple[str, str], int] = {}
    for place, (flow, num) in enumerate(sorted(wanted.items(), key=lambda item: item[1])):
        given[flow] = min(num, (budget - sum(given.values())) // (len(wanted) - place))
    return given
