"""Output tokens per second of our engine beside others at the same work: `python -m bench.engine`.

64 requests of 128 tokens in and 128 out (16 requests one at a time), greedy, end of sequence ignored, on models S and M. Every
engine runs alone, in its own process, one after the other; peers that aren't installed are left out and named.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench import models
from bench.engines import Engine, Running, engines
from bench.harness import Row, Table, compare, write


@dataclass(frozen=True)
class Work:
    """How much is asked of an engine."""

    num_requests: int = 64
    num_requests_alone: int = 16
    prompt_tokens: int = 128
    output_tokens: int = 128

    def prompts(self, concurrency: int, vocab_size: int) -> list[list[int]]:
        """The same random tokens for every engine."""
        numbers = random.Random(concurrency)
        count = self.num_requests_alone if concurrency == 1 else self.num_requests
        return [[numbers.randrange(3, vocab_size) for _ in range(self.prompt_tokens)] for _ in range(count)]


@dataclass(frozen=True)
class Measurement:
    """One engine at one model and concurrency. Times in seconds are medians over the requests."""

    engine: str
    model: str
    concurrency: int
    tp: int
    ours: bool
    tokens_per_s: float
    first_token_s: float
    per_token_s: float
    peak_rss_bytes: int
    load_s: float


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    chosen = [engine for name, engine in engines().items() if name in options.engines]
    work = Work(options.requests, min(16, options.requests), options.tokens, options.tokens)
    measured: list[Measurement] = []
    found: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for model in options.models:
        for engine in chosen:
            try:
                some, versions = measure(engine, model, options.concurrency, work, options.threads)
            except RuntimeError as error:
                left_out[f"{engine.name}, {model}"] = str(error)
                print(f"{engine.name} on {model} is left out: {error}", file=sys.stderr)
                continue
            measured += some
            found |= {package: number for package, number in versions.items() if package not in found}
    report(measured, found, left_out, options)


def measure(
    engine: Engine, model: str, concurrencies: Sequence[int], work: Work, threads: int
) -> tuple[list[Measurement], dict[str, str]]:
    """Loads once and runs at every concurrency, each after a warm-up. Raises RuntimeError if the engine can't."""
    if not engine.is_installed:
        raise RuntimeError("not installed; run bench/peers/install.sh")
    directory, vocab_size = models.directory(model), models.MODELS[model]["vocab_size"]
    measured = []
    with Running(engine, directory, threads=threads, max_concurrency=max(concurrencies)) as running:
        for concurrency in concurrencies:
            prompts = work.prompts(concurrency, vocab_size)
            running.run(prompts[:concurrency], min(16, work.output_tokens), concurrency)
            answer = running.run(prompts, work.output_tokens, concurrency)
            measured.append(summarise(answer, engine, model, concurrency, work, running))
            print(f"{engine.name}, {model}, {concurrency}: {measured[-1].tokens_per_s:.1f} tokens/s", file=sys.stderr)
        return measured, running.versions


def summarise(answer: dict[str, Any], engine: Engine, model: str, concurrency: int, work: Work, running: Running) -> Measurement:
    """Raises RuntimeError for an engine that didn't do all of the work."""
    requests = answer["requests"]
    if any(request["num_tokens"] != work.output_tokens for request in requests):
        raise RuntimeError(f"it answered with {sorted({request['num_tokens'] for request in requests})} tokens")
    between = [(r["finished_s"] - r["first_token_s"]) / max(1, r["num_tokens"] - 1) for r in requests]
    return Measurement(
        engine=engine.name,
        model=model,
        concurrency=concurrency,
        tp=engine.tp,
        ours=engine.ours,
        tokens_per_s=sum(request["num_tokens"] for request in requests) / answer["wall_s"],
        first_token_s=statistics.median(request["first_token_s"] for request in requests),
        per_token_s=statistics.median(between),
        peak_rss_bytes=running.peak_rss_bytes,
        load_s=running.load_s,
    )


def rows(measured: Sequence[Measurement]) -> list[Row]:
    """Each of ours against the best peer at the same model and concurrency."""
    compared = []
    for own in (m for m in measured if m.ours):
        same = [m for m in measured if not m.ours and (m.model, m.concurrency) == (own.model, own.concurrency)]
        peers = {m.engine: m.tokens_per_s for m in same}
        compared.append(compare(own.tokens_per_s, peers, model=own.model, concurrency=own.concurrency, tp=own.tp))
    return [row for row in compared if row is not None]


def table(measured: Sequence[Measurement]) -> Table:
    """Every measurement, with its share of the fastest at the same work."""
    lines = []
    for m in sorted(measured, key=lambda m: (m.model != "S", m.concurrency, -m.tokens_per_s)):
        best = max(o.tokens_per_s for o in measured if (o.model, o.concurrency) == (m.model, m.concurrency))
        times = [f"{m.first_token_s * 1e3:.0f}", f"{m.per_token_s * 1e3:.1f}", f"{m.peak_rss_bytes / 2**30:.1f}"]
        lines.append([m.model, str(m.concurrency), m.engine, f"{m.tokens_per_s:.0f}", f"{m.tokens_per_s / best:.2f}", *times])
    columns = ["model", "concurrency", "engine", "tokens/s", "of the best", "first token, ms", "per token, ms", "memory, GiB"]
    return Table("Output tokens per second, bfloat16 (medians over requests)", columns, lines)


def report(measured: Sequence[Measurement], found: dict[str, str], left_out: dict[str, str], options: argparse.Namespace) -> None:
    shown = table(measured)
    shown.show()
    if options.dry_run or not measured:
        return
    command = shlex.join(["python", "-m", "bench.engine", *sys.argv[1:]])
    more: dict[str, Any] = {"measurements": [asdict(m) for m in measured], "left_out": left_out}
    print(write("engine", rows(measured), shown, command=command, found=found, **more))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(models.MODELS), choices=list(models.MODELS))
    parser.add_argument("--engines", nargs="+", default=list(engines()), choices=list(engines()))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="tokens in, and tokens out")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
