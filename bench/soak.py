"""Thousands of requests of every kind through one engine, and nothing of them left: `python -m bench.soak`.

Random lengths, sampling parameters, choices and tenants on a tiny model whose KV cache is far too small for them, answers of a
given form and forced calls, more adapters than slots, prompts that poison their sequence, and callers that hang up at every
moment. Whatever is wrong (`soak_run.py` says what) ends the run with an AssertionError, growing memory the program with an error.
One seed gives the same requests; when one enters depends on the threads that read adapters and compile forms.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import takewhile

from bench.harness import HERE, Row, versions, write
from bench.slope import slope
from bench.soak_engine import tiny_engine
from bench.soak_entrance import Entrance
from bench.soak_memory import Memory
from bench.soak_model import adapters
from bench.soak_report import Result, draw, table
from bench.soak_requests import KINDS, Kind, plans
from bench.soak_run import IN_FLIGHT, Soak
from deployments.engine.local import LocalEngine
from deployments.engine.tokenizer import Tokenizer

MOST_MB_PER_MINUTE = 1.0
WARM_UP = 0.25
"""Share of the time before memory is watched: by then every shape of batch has been seen."""
LEAST_SAMPLES, SHOWN_SAMPLES = 240, 200


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    with tiny_engine(options.tp) as local, progress(options.requests) as show:
        result = soak(local, options.requests, options.seed, options.minutes * 60, show, frozenset(options.without))
    shown = table(result, options.tp)
    shown.show()
    if not options.dry_run:
        name = "soak" if options.tp == 1 else f"soak_tp{options.tp}"
        command = shlex.join(["python", "-m", "bench.soak", *sys.argv[1:]])
        rows = [Row("tiny Llama", IN_FLIGHT, options.tp, round(result.requests / result.seconds, 3), None, None, None)]
        found = versions(["torch", "transformers", "deepspeed"])
        result = replace(result, memory=result.memory[:: max(1, len(result.memory) // SHOWN_SAMPLES)])
        draw(HERE / "results" / f"{name}.svg", result)
        print(write(name, rows, shown, command=command, found=found, unit="requests per second", result=asdict(result)))
    if result.slope and result.slope.mb_per_minute >= MOST_MB_PER_MINUTE:
        sys.exit(f"memory grows: {result.slope}")


def soak(
    local: LocalEngine,
    count: int,
    seed: int,
    longest_s: float = math.inf,
    show: Callable[[int], None] = lambda ended: None,
    without: frozenset[Kind] = frozenset(),
) -> Result:
    """`count` requests, or as many as enter in `longest_s`. Raises AssertionError for whatever is wrong; the slope is for the
    caller to judge, None for a run too short to have one. `without`: kinds of requests to leave out."""
    vocab_size, base = local.info.vocab_size, local.shard.spec.directory
    drawn = plans(seed, count, vocab_size=vocab_size, max_model_len=local.info.max_model_len, without=without)
    with Entrance(local, adapters(base)) as entrance:
        memory, began = Memory(), time.monotonic()
        run = Soak(
            local.engine,
            takewhile(lambda _: time.monotonic() - began < longest_s, drawn),
            entrance=entrance,
            tokenizer=Tokenizer.load(base),
            poison=vocab_size - 1,
        )

        def after_step() -> None:
            memory.sample()
            show(run.ended)

        run.run(after_step)
        seconds, stats = time.monotonic() - began, local.engine.stats()
    warm = memory.samples[int(len(memory.samples) * WARM_UP) :]
    return Result(
        requests=run.ended,
        answered=run.answered,
        hung_up=run.hung_up,
        left=dict(run.left),
        repeated=run.repeated,
        failed=run.failed,
        formed=dict(run.formed),
        unfinished_forms=run.unfinished_forms,
        adapted=run.adapted,
        adapter_loads=entrance.num_loads,
        output_tokens=run.output_tokens,
        cached_share=stats.cached_tokens / max(1, stats.prompt_tokens),
        steps=stats.steps,
        preemptions=stats.preemptions,
        integrity_checks=run.integrity_checks,
        seconds=seconds,
        memory=memory.samples,
        slope=slope(warm) if len(warm) >= LEAST_SAMPLES else None,
    )


@contextmanager
def progress(count: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("soak", total=count)
        yield lambda ended: bar.update(task, completed=ended)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no request enters later than that")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", nargs="+", choices=list(KINDS), default=[], help="kinds of requests to leave out")
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
