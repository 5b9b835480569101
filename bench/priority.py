"""What it brings that gateways and replicas step back behind ranks: `python -m bench.priority`, as root.

One platform under the load of `bench.goodput`, at one rate near what the machine can do, in turns: everything at the niceness that
Ray gives its workers, and with gateway and replica behind, as `cluster/priority.py` puts them. Machines that are shared with others
change from minute to minute, so each turn is a pair, and what counts is how many pairs say the same. Root, because only root may
put a process forward again.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import psutil

from bench import models, systems, trace
from bench.goodput import OBJECTIVES, SHORTER, Measurement, send, summarise
from bench.harness import Row, Table, write
from bench.systems import Endpoint
from cluster.priority import BEHIND, put

RAYS = 15
"""Niceness of Ray's workers."""
AROUND = ("ServeReplica:gateway", ":LLM")
"""What the processes around the ranks are called."""


@dataclass(frozen=True)
class Turn:
    """The same load twice."""

    alike: Measurement
    behind: Measurement


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    if os.geteuid() != 0:
        sys.exit("only root may lower niceness again; run this as root")
    with systems.mmaas(options.model, threads=os.cpu_count() or 1, max_sequences=64) as endpoint:
        found = endpoint.versions
        turns = [turn(endpoint, options.model, options.rate, options.seconds) for _ in range(options.turns)]
    shown = table(turns, options.model, options.rate)
    shown.show()
    if not options.dry_run:
        command = shlex.join(["python", "-m", "bench.priority", *sys.argv[1:]])
        ours, theirs = (
            statistics.fmean(goods) for goods in zip(*((t.behind.goodput, t.alike.goodput) for t in turns), strict=True)
        )
        rows = [Row(options.model, options.rate, 1, round(ours, 3), round(theirs, 3), "all alike", round(ours / theirs, 3))]
        unit = "good requests per second where so many were offered as `concurrency` says"
        print(write("priority", rows, shown, command=command, found=found, unit=unit, turns=[asdict(turn) for turn in turns]))


def turn(endpoint: Endpoint, model: str, rate: float, seconds: float) -> Turn:
    load = trace.at_rate(trace.read(shorter=SHORTER), rate, seconds)

    def measured(niceness: int) -> Measurement:
        for process in around(endpoint.processes()):
            put(process.pid, niceness)
        name = f"niceness {niceness}"
        return summarise(name, model, rate, load, send(endpoint, model, load), OBJECTIVES[model])

    return Turn(measured(RAYS), measured(BEHIND))


def around(family: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Of a platform's processes, those that step back. Raises RuntimeError when there are none."""
    found = [process for process in family if any(name in " ".join(process.cmdline()) for name in AROUND)]
    if len(found) < len(AROUND):
        raise RuntimeError(f"a gateway and a model's replica were looked for, {len(found)} processes were found")
    return found


def table(turns: Sequence[Turn], model: str, rate: float) -> Table:
    columns = ["turn", "good/s, alike", "behind", "first text p95, ms, alike", "behind", "per token p95, ms, alike", "behind"]
    lines = [[str(number), *_cells(turn)] for number, turn in enumerate(turns, 1)]
    if len(turns) > 1:
        lines.append(["median", *(f"{statistics.median(float(line[k]) for line in lines):g}" for k in range(1, len(columns)))])
    better = sum(turn.behind.goodput > turn.alike.goodput for turn in turns)
    title = f"Gateway and replica behind the rank; model {model}, {rate:g} requests/s, better in {better} of {len(turns)} turns"
    return Table(title, columns, lines)


def _cells(turn: Turn) -> list[str]:
    pair = (turn.alike, turn.behind)
    goods = [f"{m.goodput:.2f}" for m in pair]
    firsts = [f"{m.first_s.p95 * 1e3:.0f}" if m.first_s else "nan" for m in pair]
    tokens = [f"{m.token_s.p95 * 1e3:.1f}" if m.token_s else "nan" for m in pair]
    return [*goods, *firsts, *tokens]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.priority", description=__doc__)
    parser.add_argument("--model", default="S", choices=list(models.MODELS))
    parser.add_argument("--rate", type=float, default=16, help="requests a second")
    parser.add_argument("--seconds", type=float, default=20, help="of arrivals in each half of a turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
