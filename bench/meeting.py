"""What ranks of one machine pay to talk, in microseconds: `python -m bench.meeting`.

The all-reduce that ends a row-parallel layer, and the broadcast that begins a step, through our shared memory, through gloo's
sockets and (the all-reduce, if it can be compiled here) through DeepSpeed's shared memory, whose ranks never sleep while they wait.
The three take turns in the same processes, and every rank computes for a while before each call, as in service.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.harness import Row, Table, compare, versions, write
from cluster.settings import EngineSettings
from deployments.engine.rendezvous import Rendezvous

if TYPE_CHECKING:
    from torch import Tensor


OURS, GLOO, DEEPSPEED = "ours", "gloo", "DeepSpeed"
WIDTHS = (512, 896, 4096)
BATCHES = (1, 8, 32)
BROADCASTS = (64, 4096, 65536)
"""Numbers of 32 bits; a step of 32 sequences has about a thousand, one with a long prompt many more."""


@dataclass(frozen=True)
class Case:
    """An all-reduce of `rows x columns` float32, or a broadcast of them."""

    what: str
    rows: int
    columns: int

    @property
    def name(self) -> str:
        return f"{self.what} {self.rows} x {self.columns}"


CASES = [
    *(Case("all-reduce", rows, columns) for columns in WIDTHS for rows in BATCHES),
    *(Case("broadcast", 1, count) for count in BROADCASTS),
]


@dataclass(frozen=True)
class Measurement:
    """Medians in microseconds of one case, by way; an all-reduce until the leader has the sum, a broadcast until rank 1 has it."""

    what: str
    rows: int
    columns: int
    medians_us: dict[str, float]


Call = Callable[["Tensor"], None]


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    measured = measure(options.ranks, options.rounds, options.work_us)
    shown = table(measured, options.ranks)
    shown.show()
    if not options.dry_run:
        command = shlex.join(["python", "-m", "bench.meeting", *sys.argv[1:]])
        more: dict[str, Any] = {"unit": "microseconds", "measurements": [asdict(m) for m in measured]}
        rows_ = rows(measured, options.ranks)
        print(write("meeting", rows_, shown, command=command, found=versions(["torch", "deepspeed"]), **more))


def measure(size: int, rounds: int, work_us: float) -> list[Measurement]:
    """All cases on `size` ranks in processes of their own."""
    spawn = multiprocessing.get_context("spawn")
    pairs = [spawn.Pipe(duplex=False) for _ in range(size)]
    with tempfile.TemporaryDirectory(prefix="mmaas-") as folder:
        address = f"file://{folder}/{Path(folder).name}"
        ranks = [
            spawn.Process(target=_rank, args=(Rendezvous(address, rank, size, 120), rounds, work_us, end), daemon=True)
            for rank, (_, end) in enumerate(pairs)
        ]
        for rank, (_, end) in zip(ranks, pairs, strict=True):
            rank.start()
            end.close()
        stamps: list[dict[str, dict[str, list[tuple[int, int]]]]] = [pipe.recv() for pipe, _ in pairs]
        for rank in ranks:
            rank.join(20)
            rank.kill()
    return [Measurement(case.what, case.rows, case.columns, _medians(case, stamps)) for case in CASES]


def _medians(case: Case, stamps: Sequence[dict[str, dict[str, list[tuple[int, int]]]]]) -> dict[str, float]:
    """From the leader's call until its own return, or for a broadcast until rank 1's; one clock serves all processes."""
    leader, other = stamps[0][case.name], stamps[1][case.name]
    until = other if case.what == "broadcast" else leader
    return {
        way: statistics.median((end - begin) / 1e3 for (begin, _), (_, end) in zip(leader[way], until[way], strict=True))
        for way in leader
    }


def _rank(rendezvous: Rendezvous, rounds: int, work_us: float, report: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    calls = _calls(rendezvous)
    stamps: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for case in CASES:
        tensor = torch.zeros(case.rows, case.columns)
        ways = calls[case.what]
        stamps[case.name] = {way: [] for way in ways}
        for turn in range(rounds + 5):
            for way, call in ways.items():
                stamp = _timed(call, tensor, work_us)
                if turn >= 5:
                    stamps[case.name][way].append(stamp)
    report.send(stamps)
    calls["all-reduce"][GLOO](torch.zeros(1))  # nobody ends while another still works


def _timed(call: Call, tensor: Tensor, work_us: float) -> tuple[int, int]:
    end = time.monotonic_ns() + int(work_us * 1e3)
    while time.monotonic_ns() < end:
        pass
    begin = time.monotonic_ns()
    call(tensor)
    return begin, time.monotonic_ns()


def _calls(rendezvous: Rendezvous) -> dict[str, dict[str, Call]]:
    """By what is done and by whom. DeepSpeed's kernel only reduces."""
    import torch

    from deployments.engine.native.meeting import Meeting
    from deployments.engine.wire import Gloo, all_agree, join

    ours = join(rendezvous, EngineSettings().cache).stage
    if not isinstance(ours, Meeting):
        raise SystemExit("ranks can't share memory here; the log above says why")
    gloo = Gloo()
    reduces: dict[str, Call] = {OURS: ours.all_reduce, GLOO: gloo.all_reduce}
    if all_agree(_load_deepspeed(rendezvous)):
        reduces[DEEPSPEED] = torch.ops.deepspeed.inference_all_reduce_
    _unlink_deepspeed()
    return {"all-reduce": reduces, "broadcast": {OURS: ours.broadcast, GLOO: gloo.broadcast}}


def _load_deepspeed(rendezvous: Rendezvous) -> bool:
    from deepspeed.accelerator import get_accelerator

    try:
        kernel = get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:
        print(f"without DeepSpeed's kernel: {error!s:.200}", file=sys.stderr)
        return False
    kernel.initialize(rendezvous.size, rendezvous.rank)
    return True


def _unlink_deepspeed() -> None:
    """The files that it would leave, named by MASTER_ADDR; every rank has mapped them by now."""
    for segment in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_*"):
        segment.unlink(missing_ok=True)


def rows(measured: Sequence[Measurement], size: int) -> list[Row]:
    found = []
    for m in measured:
        peers = {way: us for way, us in m.medians_us.items() if way != OURS}
        row = compare(
            m.medians_us[OURS], peers, model=f"none: {m.what} of {m.columns}", concurrency=m.rows, tp=size, higher_is_better=False
        )
        found += [row] if row else []
    return found


def table(measured: Sequence[Measurement], size: int) -> Table:
    lines = []
    for m in measured:
        ours = m.medians_us[OURS]
        times = [f"{m.medians_us[way]:.0f}" if way in m.medians_us else "" for way in (GLOO, DEEPSPEED, OURS)]
        ratios = [f"{m.medians_us[way] / ours:.1f}" if way in m.medians_us else "" for way in (GLOO, DEEPSPEED)]
        lines.append([m.what, str(m.rows), str(m.columns), *times, *ratios])
    columns = ["what", "rows", "columns", GLOO, DEEPSPEED, OURS, f"{GLOO} / {OURS}", f"{DEEPSPEED} / {OURS}"]
    return Table(f"Microseconds of talk between {size} ranks of one machine (medians)", columns, lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.meeting", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=300, help="calls of each case and way")
    parser.add_argument("--work-us", type=float, default=300, help="what a rank computes before each call")
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
