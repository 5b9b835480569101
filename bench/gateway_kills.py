"""Kills gateways under load, over and over, and counts what was lost, billed twice, executed twice. All must be nothing.

    python -m bench.gateway_kills                      # 200 kills of one gateway on SQLite: some ten minutes
    python -m bench.gateway_kills --database postgresql+psycopg://… --gateways 3

Callers want whole answers and streams, with and without `Idempotency-Key`; some hang up; one of three projects is always near the
end of its budget. A random gateway gets SIGKILL at a random moment, also while it starts, and is started again. When all is
quiet and what the dead left open was settled by the living, the books are compared with what callers saw and what the model did.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bench.callers import Attempt, Callers, outcomes
from bench.gateways import Execution, Gateways, executions
from bench.harness import Table, earlier, versions, write
from cluster.private_files import Secrets
from cluster.settings import GatewaySettings, Settings
from cluster.store import Store
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.audit import Audit, read_head
from cluster.tenancy.budgets import Budgets, balances, budgets
from cluster.tenancy.journal_tables import holds, metered_of, usage_records
from cluster.tenancy.metered import Metered
from cluster.tenancy.prices import Prices
from cluster.tenancy.projects import DEFAULT
from cluster.tenancy.rating import PriceList
from cluster.tenancy.reconcile import problems

PRICES = PriceList.model_validate(
    {
        "charges": [
            {"meter": "input_tokens", "price": "2", "per": 1_000_000},
            {"meter": "output_tokens", "price": "5", "per": 1_000_000},
        ]
    }
)
ROOM = 600
"""Micro-units that the poor project always has left: a few calls' worth."""

QUIET_S = 60.0
"""How long the living may take to settle what the dead left open."""


@dataclass(slots=True)
class Report:
    """What came of it. `lost`: had or made, and not in the books; `doubled`: paid or executed more often than it was had."""

    kills: int = 0
    ends: Counter[str] = field(default_factory=Counter)  # of attempts
    executed: int = 0
    billed: Counter[str] = field(default_factory=Counter)  # requests, by outcome
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # books, budgets, audit log, what was left open
    unpaid: int = 0  # tokens of one answer that a caller had and nobody pays, at most: its gateway was killed
    looks: int = 0  # at budgets, while they were used up
    quiet_s: float = 0.0  # from the last call's end until nothing was open

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.doubled or self.wrong)

    def plain(self) -> dict[str, Any]:
        """By field; `asdict` makes nonsense of counters."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def add(self, other: Mapping[str, Any]) -> None:
        """What an earlier piece of the run came to."""
        self.kills, self.executed = self.kills + other["kills"], self.executed + other["executed"]
        self.looks += other["looks"]
        self.ends.update(other["ends"])
        self.billed.update(other["billed"])
        self.lost, self.doubled, self.wrong = (
            self.lost + other["lost"],
            self.doubled + other["doubled"],
            self.wrong + other["wrong"],
        )
        self.unpaid, self.quiet_s = max(self.unpaid, other["unpaid"]), max(self.quiet_s, other["quiet_s"])

    def __str__(self) -> str:
        ends = ", ".join(f"{count} {way}" for way, count in self.ends.most_common())
        found = f"{len(self.lost)} lost, {len(self.doubled)} doubled, {len(self.wrong)} wrong"
        return f"{self.kills} kills, {sum(self.ends.values())} requests ({ends}), {self.executed} executions; {found}"


class Place:
    """A store with prices and three projects with keys, the last of them poor."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = Store(settings.store_url)
        self.store.migrate()
        self.journal = settings.home / "journal"
        self.journal.touch()
        Prices(self.store).publish("default", PRICES)
        self.accounts = Accounts(self.store, Secrets(settings.home).pepper)
        self.projects = [self.accounts.projects.create(DEFAULT, name).id for name in ("one", "two", "poor")]
        self.keys = [self.accounts.keys.create(project, "caller")[1] for project in self.projects]
        self.audit = Audit(self.store, Secrets(settings.home).audit_key)
        self._allowed = 0
        self.spare()

    def spare(self) -> None:
        """Give the poor project a little more: its budget is near its end all the time, and never goes down."""
        balance = Budgets(self.store).balance("project", self.projects[-1], time.time())
        self._allowed = max(self._allowed, balance.spent + balance.held + ROOM)
        Budgets(self.store).set("project", self.projects[-1], "total", self._allowed)

    def passed(self) -> list[str]:
        """Budgets that are passed at this moment by what is spent and reserved."""
        b, c = budgets.c, balances.c
        query = sa.select(b.scope, b.micro, c.spent, c.held).join(balances, c.scope == b.scope).where(c.spent + c.held > b.micro)
        with self.store.read() as connection:
            return [f"{row.scope}: {row.spent} spent and {row.held} held of {row.micro}" for row in connection.execute(query)]

    def num_open(self) -> int:
        with self.store.read() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(holds)) or 0


async def torment(
    place: Place, gateways: Gateways, callers: Callers, count: int, kills: int, pace_s: float, report: Report
) -> None:
    """Callers and kills at once, and budgets looked at between them."""
    calling = asyncio.ensure_future(callers.run(count))
    await asyncio.sleep(1.0)
    for _ in range(kills):
        await asyncio.sleep(callers.rng.uniform(0.0, 2 * pace_s))
        victim = callers.rng.choice(list(gateways))
        await asyncio.to_thread(victim.end)
        victim.start()
        report.kills += 1
        report.wrong += await asyncio.to_thread(place.passed)
        report.looks += 1
        await asyncio.to_thread(place.spare)
        if report.kills % 10 == 0:
            print(f"{report.kills} kills, {len(callers.attempts)} requests", file=sys.stderr)
    callers.stopped = True
    await calling
    print(f"every caller with a key has its answer, {len(callers.attempts)} requests", file=sys.stderr)
    await asyncio.to_thread(settle_down, place, gateways, report)


def settle_down(place: Place, gateways: Gateways, report: Report) -> None:
    start = time.monotonic()
    for each in gateways:
        each.wait()
    while place.num_open() and time.monotonic() - start < QUIET_S:
        time.sleep(0.2)
    report.quiet_s = time.monotonic() - start


def check(place: Place, attempts: Sequence[Attempt], done: dict[str, Execution], report: Report) -> None:
    """Compare what callers saw, what the model did and what the books say."""
    with place.store.read() as connection:
        rows = connection.execute(sa.select(usage_records)).all()
        still_open = connection.scalars(sa.select(holds.c.request_id)).all()
    billed = {row.request_id: metered_of(row) for row in rows}
    report.ends, report.executed = outcomes(attempts), len(done)
    report.billed = Counter(row.outcome for row in rows)
    for attempt in attempts:
        _check_attempt(attempt, billed, done, report)
    for execution in done.values():
        _check_execution(execution, billed, report)
    _check_keys(attempts, done, {row.request_id for row in rows if row.outcome in ("finished", "length")}, report)
    report.doubled += [
        f"{name} is billed for {one.output_tokens} tokens that no model said"
        for name, one in billed.items()
        if name not in done and one.output_tokens
    ]
    report.wrong += [f"{request_id} is still reserved" for request_id in still_open]
    report.wrong += place.passed() + problems(place.store)
    head = read_head(place.settings.home / "audit" / "head.json")
    report.wrong += map(str, place.audit.verify([head] if head else []).problems)


def _check_attempt(attempt: Attempt, billed: dict[str, Metered], done: dict[str, Execution], report: Report) -> None:
    paid = billed.get(attempt.request_id)
    if attempt.whole:
        if paid is None:
            report.lost.append(f"{attempt.request_id} was answered whole and is not billed")
        elif (paid.input_tokens + paid.cached_tokens, paid.output_tokens) != attempt.usage:
            report.wrong.append(f"{attempt.request_id} used {attempt.usage}, and is billed {paid}")
        if (execution := done.get(attempt.request_id)) is None or execution.nonce != attempt.nonce:
            report.wrong.append(f"{attempt.request_id} was answered to {attempt.nonce}, which did not ask for it")
    elif attempt.tokens and paid is not None:
        report.unpaid = max(report.unpaid, attempt.tokens - paid.output_tokens)


def _check_execution(execution: Execution, billed: dict[str, Metered], report: Report) -> None:
    paid = billed.get(execution.request_id)
    if paid is None:
        report.lost.append(f"{execution.request_id} was executed and is not in the books")
    elif paid.output_tokens > execution.said:
        report.doubled.append(f"{execution.request_id} said {execution.said} tokens and is billed {paid.output_tokens}")


def _check_keys(attempts: Sequence[Attempt], done: dict[str, Execution], paid: set[str], report: Report) -> None:
    """A call is executed once, with a key also after its caller has asked again; it is paid in full once."""
    had: dict[str, Attempt] = {}
    for attempt in sorted(attempts, key=lambda one: one.ended):
        if attempt.whole:
            first = had.setdefault(attempt.nonce, attempt)
            if first.request_id != attempt.request_id:
                report.doubled.append(f"{attempt.nonce} has two answers, {first.request_id} and {attempt.request_id}")
    kept = {attempt.nonce for attempt in attempts if attempt.has_key}
    runs: dict[str, list[Execution]] = {}
    for execution in done.values():
        runs.setdefault(execution.nonce, []).append(execution)
    for nonce, each in runs.items():
        late = [one for one in each if nonce in had and one.began > had[nonce].ended]
        report.doubled += [f"{nonce} was executed again after its answer: {one.request_id}" for one in late]
        if len(each) > 1 and nonce not in kept:
            report.doubled.append(f"{nonce} has no key and was executed {len(each)} times")
        if len(twice := sorted(one.request_id for one in each if one.request_id in paid)) > 1:
            report.doubled.append(f"{nonce} is paid in full {len(twice)} times: {', '.join(twice)}")


def run(settings: Settings, gateways: int, callers: int, kills: int, pace_s: float, seed: int) -> Report:
    place, report = Place(settings), Report()
    calling = Callers([], place.keys, random.Random(seed))
    with Gateways(settings, gateways, place.journal) as started:
        calling.urls = [each.url for each in started]
        asyncio.run(torment(place, started, calling, callers, kills, pace_s, report))
    check(place, calling.attempts, executions(place.journal), report)
    place.store.close()
    return report


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    with tempfile.TemporaryDirectory(prefix="mmaas-kills-") as home:
        settings = Settings(home=Path(home), database_url=options.database, gateway=GatewaySettings(replicas=options.gateways))
        report = run(settings, options.gateways, options.callers, options.kills, options.pace, options.seed)
    print(report)
    for kind in ("lost", "doubled", "wrong"):
        print(*(f"{kind}: {what}\n" for what in getattr(report, kind)[:20]), sep="", end="")
    name = "gateway_kills_postgres" if options.database else "gateway_kills"
    if options.add and (before := earlier(name)):
        report.add(before["report"])
    shown = table(report)
    shown.show()
    if not options.dry_run:
        command = shlex.join(["python", "-m", "bench.gateway_kills", *sys.argv[1:]])
        print(write(name, [], shown, command=command, found=versions(["sqlalchemy", "uvicorn", "psycopg"]), report=report.plain()))
    raise SystemExit(not report.is_clean)


def table(report: Report) -> Table:
    lines = [
        ["kills", str(report.kills)],
        ["requests", str(sum(report.ends.values()))],
        *([f"… {way}", str(count)] for way, count in report.ends.most_common()),
        ["executions", str(report.executed)],
        *([f"billed as {outcome}", str(count)] for outcome, count in report.billed.most_common()),
        ["lost, doubled, wrong", f"{len(report.lost)}, {len(report.doubled)}, {len(report.wrong)}"],
        ["tokens that a caller had of a killed gateway and nobody pays, at most", str(report.unpaid)],
        ["seconds after the last call until nothing was reserved", f"{report.quiet_s:.1f}"],
    ]
    return Table("Gateways killed under load", ["", ""], lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--gateways", type=int, default=1, help="more than one needs --database")
    parser.add_argument("--database", help="of Postgres, empty; without it SQLite in a directory of its own")
    parser.add_argument("--callers", type=int, default=24)
    parser.add_argument("--pace", type=float, default=1.5, help="seconds from kill to kill, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--add", action="store_true", help="to the result of earlier runs, as another piece of it")
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
