"""What one step of the engine costs outside the model, in microseconds: `python -m bench.step`.

Rank 0's own work around a model that takes no time: schedule and build the batch, and afterwards commit, sample greedily and
deliver; with a second rank also pack the batch and bring it to another process. Medians over the steps, for steps that
only decode and for steps that compute a piece of a prompt beside it. What splitting a step's time over its sequences takes of that
is the median difference of steps in pairs, with it and without.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.harness import Row, Table, versions, write
from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine.batch import Batch, Ints
from deployments.engine.chunking import Chunking
from deployments.engine.engine import Engine, Flight
from deployments.engine.messages import Output, Request

if TYPE_CHECKING:
    from torch import Tensor

    from deployments.engine.group import Group
    from deployments.engine.rendezvous import Rendezvous

Broadcast = Callable[[Sequence[Ints]], float]

CHUNKS = 4
"""Pieces in which each prompt enters beside the decoders."""
MODEL_STEP_S = 0.002
"""Pause between two broadcasts, in which a model would run: the other rank waits for the next batch, as in service."""


@dataclass(frozen=True)
class Case:
    """Steps of `running` decoders at `context` tokens and more, beside which `chunk` tokens of a prompt are computed (0: none)."""

    running: int
    chunk: int
    context: int = 512

    @property
    def name(self) -> str:
        return f"decode + {self.chunk}" if self.chunk else "decode"


@dataclass(frozen=True)
class Times:
    """Of one step, in microseconds."""

    schedule_us: float
    pack_us: float
    deliver_us: float

    @property
    def own_us(self) -> float:
        """What a single rank takes."""
        return self.schedule_us + self.deliver_us


class Unmetered(Engine):
    """The same, but a step's time is nobody's."""

    def _attribute(self, flight: Flight, seconds: float, outputs: list[Output]) -> None:
        self._spoke.clear()


@dataclass(frozen=True)
class Measurement:
    """Medians in microseconds. `schedule_us` includes building the batch, `deliver_us` commit and sampling; `broadcast_us` is from
    the leader's call until the other process has unpacked the batch of `batch_ints` numbers. `metering_us` is what splitting the
    step's time takes of `deliver_us`."""

    work: str
    running: int
    schedule_us: float
    pack_us: float
    deliver_us: float
    broadcast_us: float
    batch_ints: int
    metering_us: float

    def total_us(self, tp: int) -> float:
        """What a step costs beside the model; a single rank neither packs nor broadcasts."""
        return self.schedule_us + self.deliver_us + (self.pack_us + self.broadcast_us if tp > 1 else 0)


class NoModel:
    """Stands where the model is: answers at once, keeps the packed batches and notes when it was reached and left."""

    def __init__(self, rows: int, vocab_size: int) -> None:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # as each of two ranks has
        self._logits = torch.rand(rows, vocab_size, generator=torch.Generator().manual_seed(0)).bfloat16()
        self.reached = self.packed = self.left = 0.0
        self.batches: list[Ints] = []

    def execute(self, batch: Batch) -> Tensor:
        self.reached = time.perf_counter()
        self.batches.append(batch.pack())
        self.packed = time.perf_counter()
        logits = self._logits[: len(batch.sampled)]
        self.left = time.perf_counter()
        return logits


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    measured = []
    with other_rank() as broadcast:
        for chunk in (0, options.chunk):
            for running in options.running:
                measured.append(measure(Case(running, chunk), options.steps, options.vocab_size, broadcast))
                print(f"{measured[-1].work}, {running}: {measured[-1].total_us(2):.0f} us", file=sys.stderr)
    shown = table(measured)
    shown.show()
    if not options.dry_run:
        command = shlex.join(["python", "-m", "bench.step", *sys.argv[1:]])
        more: dict[str, Any] = {"unit": "microseconds per step outside the model", "measurements": [asdict(m) for m in measured]}
        print(write("step", rows(measured), shown, command=command, found=versions(["torch", "numpy"]), **more))


def measure(case: Case, num_steps: int, vocab_size: int, broadcast: Broadcast) -> Measurement:
    model = NoModel(case.running + 1, vocab_size)
    taken = list(steps(case, num_steps, model))
    batches = model.batches[-num_steps:]
    return Measurement(
        case.name,
        case.running,
        statistics.median(times.schedule_us for times in taken),
        statistics.median(times.pack_us for times in taken),
        statistics.median(times.deliver_us for times in taken),
        broadcast(batches),
        round(statistics.median(map(len, batches))),
        metering_us(case, num_steps, vocab_size),
    )


def metering_us(case: Case, num_steps: int, vocab_size: int) -> float:
    """In turns, so that whatever slows the machine slows both."""
    metered, unmetered = (steps(case, num_steps, NoModel(case.running + 1, vocab_size), kind) for kind in (Engine, Unmetered))
    differences = []
    for number in range(num_steps):
        first, second = (metered, unmetered) if number % 2 else (unmetered, metered)
        times = {first: next(first), second: next(second)}
        differences.append(times[metered].own_us - times[unmetered].own_us)
    return statistics.median(differences)


def steps(case: Case, num_steps: int, model: NoModel, kind: type[Engine] = Engine) -> Iterator[Times]:
    """Brings the decoders to their context, then times `num_steps` steps."""
    engine, prompts = _decoding(case, num_steps, model, kind), _prompts(case.chunk * CHUNKS)
    for number in range(case.running, case.running + num_steps):
        if case.chunk and not engine.scheduler.waiting:
            engine.add(_request(number, next(prompts), max_tokens=1))
        began = time.perf_counter()
        engine.step()
        ended = time.perf_counter()
        yield Times((model.reached - began) * 1e6, (model.packed - model.reached) * 1e6, (ended - model.left) * 1e6)


def _decoding(case: Case, num_steps: int, model: NoModel, kind: type[Engine]) -> Engine:
    """An engine whose decoders have their prompts behind them and don't end soon."""
    prompt_tokens, max_tokens = case.running * case.context, num_steps + 2
    sequences = case.running + bool(case.chunk)
    settings = EngineSettings(max_sequences=sequences, max_batch_tokens=max(16, prompt_tokens), step_target_ms=0, speculation=0)
    longest = [case.context + max_tokens] * case.running + [case.chunk * CHUNKS] * 2
    blocks = sum(-(-tokens // settings.block_size) for tokens in longest)
    engine = kind.of(model.execute, blocks, settings)
    for number, prompt in zip(range(case.running), _prompts(case.context), strict=False):
        engine.add(_request(number, prompt, max_tokens))
    engine.step()
    engine.chunking = Chunking(case.running + case.chunk, 0)
    return engine


def _prompts(length: int) -> Iterator[list[int]]:
    """All different, so that no two share a block."""
    numbers = random.Random(0)
    while True:
        yield [numbers.randrange(1000) for _ in range(length)]


def _request(number: int, prompt: list[int], max_tokens: int) -> Request:
    return Request(number, prompt, Sampling(temperature=0.0, ignore_eos=True), max_tokens, stop_ids=[], seed=0)


@contextmanager
def other_rank() -> Iterator[Broadcast]:
    """A second process in a group with this one. Yields what broadcasts batches to it and says the median time, in microseconds."""
    from deployments.engine.group import Group
    from deployments.engine.rendezvous import Rendezvous

    spawn = multiprocessing.get_context("spawn")
    arrivals, reports = spawn.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="mmaas-") as meeting:
        leader = Rendezvous(f"file://{meeting}/{Path(meeting).name}", 0, 2, timeout_s=60)
        follower = spawn.Process(target=_follow, args=(replace(leader, rank=1), reports), daemon=True)
        follower.start()
        group = Group(leader, native=EngineSettings().cache)
        try:
            yield lambda batches: statistics.median(_broadcast(group, batch, arrivals) for batch in batches)
        finally:
            group.stop()
            follower.join(10)
            follower.kill()


def _broadcast(group: Group, batch: Ints, arrivals: Connection) -> float:
    time.sleep(MODEL_STEP_S)
    began = time.monotonic_ns()
    group.send(batch)
    arrived: int = arrivals.recv()
    return (arrived - began) / 1e3


def _follow(rendezvous: Rendezvous, reports: Connection) -> None:
    """The other rank: says when it has each batch. One host's monotonic clock is the same in every process."""
    from deployments.engine.group import Group

    group = Group(rendezvous, native=EngineSettings().cache)
    while (packed := group.receive()) is not None:
        Batch.unpack(packed)
        reports.send(time.monotonic_ns())


def rows(measured: Sequence[Measurement]) -> list[Row]:
    """Others don't say what their steps cost, so that there is no peer. `model` says what kind of step it was."""
    return [Row(f"none: {m.work}", m.running, tp, round(m.total_us(tp), 1), None, None, None) for m in measured for tp in (1, 2)]


def table(measured: Sequence[Measurement]) -> Table:
    lines = []
    for m in measured:
        cells = (m.schedule_us, m.deliver_us, m.metering_us, m.total_us(1), m.pack_us, m.broadcast_us, m.total_us(2))
        lines.append([m.work, str(m.running), *(f"{microseconds:.0f}" for microseconds in cells)])
    columns = ["step", "sequences", "schedule", "deliver", "of it metering", "all, tp=1", "pack", "broadcast", "all, tp=2"]
    title = "Microseconds of one step outside the model (medians over steps; + N: beside N tokens of a prompt)"
    return Table(title, columns, lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--running", nargs="+", type=int, default=[1, 32, 256], help="decoding sequences")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a prompt beside them, in the second half of the table")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
