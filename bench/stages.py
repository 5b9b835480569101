"""What stages cost and bring on one machine: `python -m bench.stages`.

Two stages with two steps at once, two stages with one step at a time, two tensor parts, and one rank, each with all cores: output
tokens per second, and which part of its time the last stage waits for the first. They take turns in processes that live side by
side. Then what it takes to hand hidden states over, from the first stage's call until the second has them.

Stages are for models that fit no single node. Here they only share two cores, so this shows what they lose, not what they gain.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.harness import Row, Table, compare, versions, write
from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine.rendezvous import Rendezvous

OVERLAPPED, IN_TURN, TENSOR, ALONE = "pp=2", "pp=2, a step at a time", "tp=2", "one rank"
WAYS = (OVERLAPPED, IN_TURN, TENSOR, ALONE)
SHAPES = {OVERLAPPED: (1, 2), TENSOR: (2, 1), ALONE: (1, 1)}
"""Tensor parts and stages of each engine; the one with two stages does both of its ways."""
CONCURRENCIES = (1, 8, 32)
ROWS = (1, 8, 32, 512)
PROMPT, OUTPUT = 32, 64


@dataclass(frozen=True)
class Round:
    """One way, once."""

    tokens_per_s: float
    waiting: float  # of the last stage's time inside the model, the share that it waited for the first


@dataclass(frozen=True)
class Measurement:
    """Medians over the rounds, by way."""

    model: str
    concurrency: int
    tokens_per_s: dict[str, float]
    waiting: dict[str, float]


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    measured = [m for model in options.models for m in measure(model, options.rounds)]
    handed = hand_over(options.rounds * 100)
    for shown in tables(measured, handed):
        shown.show()
    if not options.dry_run:
        command = shlex.join(["python", "-m", "bench.stages", *sys.argv[1:]])
        more: dict[str, Any] = {"measurements": [asdict(m) for m in measured], "hand_over_us": handed}
        print(write("stages", rows(measured), *tables(measured, handed), command=command, found=versions(["torch"]), **more))


def measure(model: str, rounds: int) -> list[Measurement]:
    spawn = multiprocessing.get_context("spawn")
    pipes = {way: spawn.Pipe() for way in SHAPES}
    engines = [spawn.Process(target=_engine, args=(model, *SHAPES[way], pipes[way][1])) for way in SHAPES]
    for engine in engines:
        engine.start()
    try:
        ends = {way: pipes[OVERLAPPED if way == IN_TURN else way][0] for way in WAYS}
        for pipe, _ in pipes.values():
            pipe.recv()
        found = [_measured(ends, model, concurrency, rounds) for concurrency in CONCURRENCIES]
        for pipe, _ in pipes.values():
            pipe.send(None)
        for engine in engines:
            engine.join(30)
    finally:
        for engine in engines:
            engine.kill()
    return found


def _measured(ends: dict[str, Connection], model: str, concurrency: int, rounds: int) -> Measurement:
    done: dict[str, list[Round]] = {way: [] for way in WAYS}
    for turn in range(rounds + 1):
        for way, end in ends.items():
            end.send((concurrency, 1 if way == IN_TURN else SHAPES[way][1]))
            result = end.recv()
            if turn:  # the first warms up
                done[way].append(result)
    return Measurement(
        model,
        concurrency,
        {way: statistics.median(one.tokens_per_s for one in found) for way, found in done.items()},
        {way: statistics.median(one.waiting for one in done[way]) for way in (OVERLAPPED, IN_TURN)},
    )


def _engine(model: str, tp: int, pp: int, pipe: Connection) -> None:
    from bench import models
    from deployments.engine.local import LocalEngine

    threads = max(1, (os.cpu_count() or 1) // (tp * pp))
    settings = EngineSettings(kv_cache_bytes=256 << 20, threads=threads, prefix_cache=False, speculation=0)
    with LocalEngine(models.directory(model), tp=tp, pp=pp, dtype="bfloat16", settings=settings) as engine:
        pipe.send("ready")
        while task := pipe.recv():
            concurrency, engine.engine.scheduler.depth = task
            pipe.send(_round(engine, concurrency))


def _round(engine: Any, concurrency: int) -> Round:
    draw = random.Random(0)
    prompts = [[draw.randrange(10, 16_000) for _ in range(PROMPT)] for _ in range(concurrency)]
    waited, inside, began = _waited(engine), engine.engine.stats().model_s, time.perf_counter()
    answers = engine.generate(prompts, Sampling(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True))
    seconds = time.perf_counter() - began
    inside = engine.engine.stats().model_s - inside
    return Round(sum(len(answer.token_ids) for answer in answers) / seconds, (_waited(engine) - waited) / inside)


def _waited(engine: Any) -> float:
    return float(engine.shard.handover.waited_s) if engine.shard.handover else 0.0


def hand_over(rounds: int, width: int = 4096) -> dict[int, float]:
    """Microseconds by number of rows, of `width` float32 each."""
    spawn = multiprocessing.get_context("spawn")
    pairs = [spawn.Pipe(duplex=False) for _ in range(2)]
    with tempfile.TemporaryDirectory(prefix="mmaas-") as folder:
        address = f"file://{folder}/{Path(folder).name}"
        ranks = [
            spawn.Process(target=_hand, args=(Rendezvous(address, rank, 2, 120, 2), rounds, width, end), daemon=True)
            for rank, (_, end) in enumerate(pairs)
        ]
        for rank in ranks:
            rank.start()
        had, given = (pipe.recv() for pipe, _ in pairs)
        for rank in ranks:
            rank.join(20)
            rank.kill()
    return {rows: statistics.median((b - a) / 1e3 for a, b in zip(given[rows], had[rows], strict=True)) for rows in ROWS}


def _hand(rendezvous: Rendezvous, rounds: int, width: int, report: Connection) -> None:
    """When this rank gave, or had, the states of each round: one clock serves both processes."""
    import torch

    from deployments.engine.handover import Handover
    from deployments.engine.wire import all_agree, join

    torch.set_num_threads(1)
    join(rendezvous, None)
    handover, stamps = Handover(rendezvous.place), {}
    for rows in ROWS:
        stamps[rows] = [_handed(handover, rendezvous.rank == 0, torch.ones(rows, width)) for _ in range(rounds)]
    all_agree(True)  # nobody ends while another still works
    report.send(stamps)


def _handed(handover: Any, takes: bool, hidden: Any) -> int:
    if takes:
        handover.take(*hidden.shape, hidden.dtype)
        return time.monotonic_ns()
    end = time.monotonic_ns() + 2_000_000  # a stage computes before it gives, and the next one waits meanwhile
    while time.monotonic_ns() < end:
        pass
    began = time.monotonic_ns()
    handover.give(hidden)
    return began


def rows(measured: Sequence[Measurement]) -> list[Row]:
    """Two stages against the better of two tensor parts and one rank."""
    found = []
    for m in measured:
        peers = {way: m.tokens_per_s[way] for way in (TENSOR, ALONE)}
        row = compare(m.tokens_per_s[OVERLAPPED], peers, model=m.model, concurrency=m.concurrency, tp=1)
        found += [row] if row else []
    return found


def tables(measured: Sequence[Measurement], handed: dict[int, float]) -> list[Table]:
    columns = [
        "model",
        "concurrency",
        *WAYS,
        f"{OVERLAPPED} / {IN_TURN}",
        f"{OVERLAPPED} / {ALONE}",
        "waits",
        "waits, a step at a time",
    ]
    lines = []
    for m in measured:
        speeds = [f"{m.tokens_per_s[way]:.0f}" for way in WAYS]
        ratios = [f"{m.tokens_per_s[OVERLAPPED] / m.tokens_per_s[way]:.2f}" for way in (IN_TURN, ALONE)]
        waits = [f"{m.waiting[way]:.0%}" for way in (OVERLAPPED, IN_TURN)]
        lines.append([m.model, str(m.concurrency), *speeds, *ratios, *waits])
    first = Table("Output tokens per second, bfloat16; share of the last stage's time that it waits for the first", columns, lines)
    over = [[str(number), f"{us:.0f}"] for number, us in handed.items()]
    return [first, Table("Microseconds to hand rows of 4,096 float32 over to the next stage, on one machine", ["rows", "us"], over)]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.stages", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["S", "M"])
    parser.add_argument("--rounds", type=int, default=5, help="of each way and concurrency, after one that warms up")
    parser.add_argument("--dry-run", action="store_true", help="show the tables and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
