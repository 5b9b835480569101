"""Kills the ledger's writer, over and over, and counts what was lost and what was booked twice. Both must be nothing.

    python -m bench.ledger_kills            # about a thousand kills and as many losses of power: some minutes

Ways to end a writer, all on SQLite in a directory of their own; the last one in the tests alone:

    at any time     SIGKILL after a random time
    at a syscall    SIGKILL at its n-th write, sync, truncate or unlink, for every n (strace)
    power loss      one traced run is replayed up to every such call: what was not synced by then is gone (`crash_states.py`)
    a failed sync   fdatasync says EIO: the writer must stop for good, and never seem to succeed again (strace)

A writer says of each operation that it is done only after the ledger has returned. What it said must be in the books, once; what it
did not get to say may be there or not, but whole. After each end the reservations it left open are reaped and the books audited.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bench import crash_states, harness
from bench.harness import Table, earlier, versions
from cluster.errors import LedgerUnavailable
from cluster.store import Store
from cluster.tenancy.journal_tables import postings, usage_records
from cluster.tenancy.ledger import Ledger
from cluster.tenancy.metered import Metered
from cluster.tenancy.rating import PriceList
from cluster.tenancy.reconcile import problems
from cluster.types import Principal

CALLS = "pwrite64,write,fdatasync,fsync,ftruncate,unlink"
CALLER = Principal("web", "k1", frozenset(), "acme")
PRICES = PriceList.model_validate({"charges": [{"meter": "output_tokens", "price": "0.000003"}]})


@dataclass(slots=True)
class Report:
    """What came of it. `lost`: said and not in the books; `doubled`: there more than once, or at another amount."""

    ends: Counter[str] = field(default_factory=Counter)
    said: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # by the audit of the books

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.doubled or self.wrong)

    def plain(self) -> dict[str, Any]:
        """By field; `asdict` makes nonsense of counters."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def add(self, other: Mapping[str, Any]) -> None:
        """What an earlier piece of the run came to."""
        self.ends.update(other["ends"])
        self.said += other["said"]
        self.lost, self.doubled, self.wrong = (
            self.lost + other["lost"],
            self.doubled + other["doubled"],
            self.wrong + other["wrong"],
        )

    def __str__(self) -> str:
        ends = ", ".join(f"{count} {way}" for way, count in self.ends.items())
        found = f"{len(self.lost)} lost, {len(self.doubled)} doubled, {len(self.wrong)} errors of the books"
        return f"{ends}; {self.said} facts said, {found}"


def prepare(directory: Path) -> str:
    """An empty ledger with prices; returns its URL."""
    url = f"sqlite:///{directory / 'ledger.db'}"
    store = Store(url)
    store.migrate()
    Ledger(store).prices.publish("default", PRICES)
    store.close()
    return url


def write(url: str, name: str, said: int, requests: int) -> None:
    """The writer: requests in pairs, so that one is always open. Says on `said` what is done, one line a fact."""

    def say(line: str) -> None:
        os.write(said, f"{line}\n".encode())

    ledger, before = Ledger(Store(url)), ""
    for number in range(requests):
        request = f"{name}-{number}"
        ledger.reserve(CALLER, request, "chat", Metered(output_tokens=100))
        say(f"reserve {request}")
        ledger.progress(request, Metered(output_tokens=1 + number % 7))
        if before:
            amount = ledger.settle(before, Metered(output_tokens=10 + number % 50), "finished").amount
            say(f"settle {before} {amount}")
        before = request


def started(
    url: str, name: str, requests: int = 10_000, go: int | None = None, run: Callable[..., None] = write
) -> tuple[int, int]:
    """A forked writer, by its pid, and the pipe that it says its facts on. It waits for a byte on `go`, if given."""
    reading, said = os.pipe()
    pid = os.fork()
    if pid:
        os.close(said)
        return pid, reading
    status = 1
    try:
        os.close(reading)
        if go is not None:
            os.read(go, 1)
        run(url, name, said, requests)
        status = 0
    finally:
        os._exit(status)


def heard(reading: int, pid: int) -> list[str]:
    """All that was said, once the writer has ended."""
    with os.fdopen(reading) as pipe:
        lines = pipe.read().splitlines(keepends=True)
    os.waitpid(pid, 0)
    return [line.rstrip("\n") for line in lines if line.endswith("\n")]


def killed_at_any_time(url: str, name: str, rng: random.Random) -> list[str]:
    pid, reading = started(url, name)
    time.sleep(rng.uniform(0.02, 0.3))
    os.kill(pid, signal.SIGKILL)
    return heard(reading, pid)


def traced(pid: int, *options: str) -> subprocess.Popen[bytes]:
    """strace, holding on to a process that waits."""
    tracer = subprocess.Popen(["strace", "-f", *options, "-p", str(pid)], stderr=subprocess.PIPE)
    assert tracer.stderr
    tracer.stderr.readline()  # says that it is attached
    return tracer


def with_tracer(url: str, name: str, *options: str, requests: int, run: Callable[..., None] = write) -> list[str]:
    waiting, go = os.pipe()
    pid, reading = started(url, name, requests, waiting, run)
    tracer = traced(pid, *options)
    os.write(go, b"!")
    said = heard(reading, pid)
    tracer.communicate(timeout=60)
    os.close(waiting)
    os.close(go)
    return said


def killed_at_a_call(url: str, name: str, number: int) -> list[str]:
    """SIGKILL as the `number`-th of `CALLS` begins."""
    return with_tracer(url, name, "-o", "/dev/null", "-e", f"inject={CALLS}:signal=KILL:when={number}", requests=12)


def refuse_after_a_failed_sync(url: str, name: str, said: int, requests: int) -> None:
    """A writer that goes on asking after the ledger has failed: it must be refused every time."""
    try:
        write(url, name, said, requests)
    except LedgerUnavailable:
        ledger = Ledger(Store(url))
        ledger._broken = True  # what the failed one is; a new process would recover from the file first
        for again in range(3):
            try:
                ledger.reserve(CALLER, f"{name}-again-{again}", "chat", 1)
            except LedgerUnavailable:
                os.write(said, b"refused\n")


def audited(url: str, said: list[str], way: str, report: Report) -> None:
    """Compare what was said with the books; then reap what was left open, and look again."""
    store = Store(url)
    report.ends[way] += 1
    try:
        check(store, said, report)
        elapsed = [0.0]
        reaper = Ledger(store, monotonic=lambda: elapsed[0])
        reaper.reap()  # looks for the first time
        elapsed[0] = 3600.0
        reaper.reap()
        report.wrong += problems(store)
    except sa.exc.DatabaseError as error:
        report.wrong.append(f"the database can't be read: {error.orig}")
    finally:
        store.close()


def check(store: Store, said: list[str], report: Report) -> None:
    with store.read() as connection:
        booked = Counter(
            f"{kind} {subject}" for kind, subject in connection.execute(sa.select(postings.c.kind, postings.c.subject))
        )
        amounts = {row[0]: row[1] for row in connection.execute(sa.select(usage_records.c.request_id, usage_records.c.amount))}
    for line in said:
        kind, request, *amount = line.split()
        report.said += 1
        report.lost += [line] * (not booked[f"{kind} {request}"])
        report.doubled += [line] * (
            booked[f"{kind} {request}"] > 1 or (amount != [] and amounts.get(request, -1) != int(amount[0]))
        )
    report.doubled += [fact for fact, count in booked.items() if count > 1]
    report.wrong += problems(store)


def lose_power(directory: Path, report: Report, requests: int, step: int = 1, run: Callable[..., None] = write) -> None:
    """Replay a traced run up to every `step`-th of its calls, as if power were lost there."""
    url = prepare(directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    trace = directory / "trace"
    options = ("-o", str(trace), "-xx", "-s", "1000000", "-e", f"trace=openat,close,{CALLS}")
    with_tracer(url, "power", *options, requests=requests, run=run)
    disk = crash_states.disk_of(before, directory)
    for point, call in enumerate(crash_states.parse(trace.read_text())):
        disk.apply(call)
        if point % step or call.verb == "close":
            continue
        for files in disk.states():
            with tempfile.TemporaryDirectory(dir=directory) as place:
                for name, content in files.items():
                    (Path(place) / name).write_bytes(content)
                audited(f"sqlite:///{place}/ledger.db", disk.words(), "losses of power", report)


def table(report: Report) -> Table:
    lines = [*([way, str(count)] for way, count in report.ends.items()), ["facts that writers said", str(report.said)]]
    lines.append(["lost, doubled, errors of the books", f"{len(report.lost)}, {len(report.doubled)}, {len(report.wrong)}"])
    return Table("The ledger's writer ended, over and over", ["", ""], lines)


def main(argv: Sequence[str] | None = None) -> None:
    asked = _arguments(argv)
    logging.disable(logging.WARNING)  # every reaper says that it found something
    report, rng = Report(), random.Random(asked.seed)
    with tempfile.TemporaryDirectory(prefix="mmaas-kills-") as place:
        url = prepare(fresh(Path(place) / "any"))
        for number in range(asked.kills):
            audited(url, killed_at_any_time(url, f"t{number}", rng), "killed at any time", report)
        if shutil.which("strace"):
            url = prepare(fresh(Path(place) / "call"))
            for number in range(asked.first_call, asked.first_call + asked.calls):
                audited(url, killed_at_a_call(url, f"c{number}", number), "killed at a syscall", report)
            if asked.requests:
                lose_power(fresh(Path(place) / "power"), report, asked.requests)
    if asked.add and (before := earlier("ledger_kills")):
        report.add(before["report"])
    print(report)
    for kind in ("lost", "doubled", "wrong"):
        print(*getattr(report, kind)[:20], sep="\n", end="")
    if not asked.dry_run:
        command = shlex.join(["python", "-m", "bench.ledger_kills", *sys.argv[1:]])
        print(
            harness.write("ledger_kills", [], table(report), command=command, found=versions(["sqlalchemy"]), report=report.plain())
        )
    raise SystemExit(not report.is_clean)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=700, help="kills at a random time")
    parser.add_argument("--calls", type=int, default=300, help="kills at the n-th write, sync, truncate or unlink")
    parser.add_argument("--first-call", type=int, default=1, help="the first such n")
    parser.add_argument("--requests", type=int, default=8, help="requests of the run that loses power at every call; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--add", action="store_true", help="to the result of earlier runs, as another piece of it")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    return parser.parse_args(argv)


def fresh(directory: Path) -> Path:
    directory.mkdir()
    return directory


if __name__ == "__main__":
    main()
