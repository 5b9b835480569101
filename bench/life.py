"""What safety costs, and how quickly a model sleeps, wakes and takes other weights: `python -m bench.life`.

The first table has the look at whether a step's logits are finite, beside the choice of tokens without it, by turns in one process,
medians in microseconds; and the look at all weights at load, beside the whole load. The second has one rank of our engine in a
process of its own: seconds, and the memory of the process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import models
from bench.harness import Row, Table, versions, write

if TYPE_CHECKING:
    from torch import Tensor

MIB = 1 << 20
PROMPT = list(range(5, 69))


@dataclass(frozen=True)
class Check:
    """Median microseconds of choosing the tokens of `rows` rows of logits, without and with the look at them."""

    rows: int
    vocab_size: int
    without_us: float
    with_us: float


@dataclass(frozen=True)
class Lived:
    """One life of one model: seconds of each event, MiB of the process after it."""

    model: str
    weights_mib: float
    load_s: float
    scan_s: float  # of load_s
    sleep_s: float
    wake_s: float
    swap_s: float
    empty_mib: float
    awake_mib: float
    asleep_mib: float
    swapped_mib: float


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    checks = [check(rows, options.vocab_size, options.turns) for rows in options.rows]
    lives = [in_a_process(name) for name in options.models]
    shown = tables(checks, lives)
    for table in shown:
        table.show()
    if not options.dry_run:
        command = shlex.join(["python", "-m", "bench.life", *sys.argv[1:]])
        more: dict[str, Any] = {"checks": [asdict(c) for c in checks], "lives": [asdict(life) for life in lives]}
        print(write("life", rows(lives), *shown, command=command, found=versions(["torch", "numpy"]), **more))


def check(num_rows: int, vocab_size: int, turns: int) -> Check:
    import torch

    from deployments.engine.sampler import best

    def largest(logits: Tensor) -> list[int]:
        return logits.numpy().argmax(-1).tolist()  # type: ignore[no-any-return]

    logits = torch.rand(num_rows, vocab_size, generator=torch.Generator().manual_seed(0))
    times: dict[Callable[[Tensor], list[int]], list[float]] = {largest: [], best: []}
    for _ in range(turns):
        for choose, taken in times.items():
            began = time.perf_counter()
            choose(logits)
            taken.append((time.perf_counter() - began) * 1e6)
    return Check(num_rows, vocab_size, *(statistics.median(taken) for taken in times.values()))


def in_a_process(name: str) -> Lived:
    """Memory is the process's, so every model has its own."""
    spawn = multiprocessing.get_context("spawn")
    pipe, end = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_send, args=(name, end), daemon=True)
    process.start()
    end.close()
    try:
        lived: Lived = pipe.recv()
    finally:
        process.join(10)
        process.kill()
    return lived


def _send(name: str, end: Any) -> None:
    end.send(live(name, models.directory(name)))


def live(name: str, directory: Path) -> Lived:
    """Load, answer, sleep, wake, and swap for the same weights under another name."""
    from cluster.settings import EngineSettings
    from deployments.engine import finite, memory
    from deployments.engine.local import LocalEngine
    from deployments.engine.orders import Sleep, Swap, Wake

    settings = EngineSettings(kv_cache_bytes=256 * MIB)
    models_own_code(settings, directory)
    memory.give_back()
    scanned, look = [0.0], finite.require

    def timed_look(*given: Any) -> None:
        began = time.perf_counter()
        look(*given)
        scanned[0] += time.perf_counter() - began

    finite.require = timed_look
    empty = memory.resident()
    load_s, engine = _timed(lambda: LocalEngine(directory, dtype="bfloat16", settings=settings))
    scan_s = scanned[0]
    with engine:
        said = answer(engine)
        awake, weights = memory.resident(), engine.shard.runner.weight_bytes
        sleep_s, _ = _timed(lambda: engine.obey(Sleep()))
        asleep = memory.resident()
        wake_s, _ = _timed(lambda: engine.obey(Wake()))
        assert answer(engine) == said, "it woke as another"
        swap_s, _ = _timed(lambda: engine.obey(Swap(str(directory))))
        assert answer(engine) == said, "the same weights say something else"
        swapped = memory.resident()
    sizes = (size / MIB for size in (empty, awake, asleep, swapped))
    return Lived(name, weights / MIB, load_s, scan_s, sleep_s, wake_s, swap_s, *sizes)


def models_own_code(settings: Any, directory: Path) -> None:
    """What is imported and built at the first load isn't the second one's time and memory."""
    from deployments.engine.local import LocalEngine

    with LocalEngine(directory, dtype="bfloat16", settings=settings) as engine:
        answer(engine)


def answer(engine: Any) -> list[int]:
    from cluster.types import Sampling

    found: list[int] = engine.generate([PROMPT], Sampling(temperature=0.0, max_tokens=16))[0].token_ids
    return found


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def rows(lives: Sequence[Lived]) -> list[Row]:
    """Nobody to compare with here; `ours` is seconds to wake."""
    return [Row(life.model, 1, 1, round(life.wake_s, 3), None, None, None) for life in lives]


def tables(checks: Sequence[Check], lives: Sequence[Lived]) -> tuple[Table, Table]:
    lines = [
        [
            f"{c.rows} rows of {c.vocab_size} logits",
            f"{c.without_us:.0f} us",
            f"{c.with_us:.0f} us",
            f"{c.with_us / c.without_us:.3f}",
        ]
        for c in checks
    ]
    for life in lives:
        without = life.load_s - life.scan_s
        lines.append([f"load of {life.model}", f"{without:.2f} s", f"{life.load_s:.2f} s", f"{life.load_s / without:.3f}"])
    cost = Table("What looking for numbers that aren't finite costs", ["work", "without", "with", "ratio"], lines)
    columns = ["model", "weights", "load", "sleep", "wake", "swap", "empty", "awake", "asleep", "after a swap"]
    cells = []
    for life in lives:
        times = [f"{seconds:.2f} s" for seconds in (life.load_s, life.sleep_s, life.wake_s, life.swap_s)]
        sizes = [f"{size:.0f} MiB" for size in (life.empty_mib, life.awake_mib, life.asleep_mib, life.swapped_mib)]
        cells.append([life.model, f"{life.weights_mib:.0f} MiB", *times, *sizes])
    return cost, Table("Sleep, wake and other weights, bfloat16, one rank: seconds, and memory of its process", columns, cells)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.life", description=__doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 32, 256], help="sequences that sample in a step")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--models", nargs="*", choices=list(models.MODELS), default=list(models.MODELS))
    parser.add_argument("--dry-run", action="store_true", help="show the tables and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
