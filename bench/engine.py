"""Output tokens per second of our engine beside others at the same work: `python -m bench.engine`.

64 requests of 128 tokens in and 128 out (16 requests one at a time), greedy, end of sequence ignored, on models S and M. Every
engine runs alone, in its own process, one after the other; peers that aren't installed are left out and named. What is measured is
written after every engine: a run that was cut goes on with `--resume`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench import bandwidth, models
from bench.engine_report import BEYOND, plots, ratios, rows, tables
from bench.engines import Engine, Running, engines
from bench.harness import HERE, Spread, write
from bench.measurement import Measurement, Run, gaps
from bench.prompts import random_prompts


@dataclass(frozen=True)
class Work:
    """How much is asked of an engine."""

    num_requests: int = 64
    num_requests_alone: int = 16
    prompt_tokens: int = 128
    output_tokens: int = 128

    def prompts(self, concurrency: int, vocab_size: int) -> list[list[int]]:
        """The same random tokens for every engine."""
        count = self.num_requests_alone if concurrency == 1 else self.num_requests
        return random_prompts(concurrency, count, self.prompt_tokens, vocab_size)


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    run = Run.load(HERE / "results" / "engine.json") if options.resume else _new_run(options)
    for model, name in run.missing:
        if options.bandwidth:
            note_bandwidth(run, model)
        try:
            add(run, engines()[name], model)
        except RuntimeError as error:
            run.left_out[f"{name}, {model}"] = str(error)
            print(f"{name} on {model} is left out: {error}", file=sys.stderr)
        if not options.dry_run and run.measurements:
            report(run)
    for shown in tables(run):
        shown.show()


def add(run: Run, engine: Engine, model: str) -> None:
    """Measures one engine on one model. Raises RuntimeError if it can't."""
    asked = run.options
    work = Work(asked["requests"], min(16, asked["requests"]), asked["tokens"], asked["tokens"])
    measured, versions = measure(engine, model, asked["concurrency"], work, asked["threads"])
    run.measurements += measured
    run.versions |= {package: number for package, number in versions.items() if package not in run.versions}


def note_bandwidth(run: Run, model: str) -> None:
    """Again before every engine, of which the most counts: who else uses the machine differs from moment to moment."""
    run.note_bandwidth(BEYOND, bandwidth.measure(bandwidth.BEYOND_CACHES_BYTES, run.options["threads"]))
    run.note_bandwidth(model, bandwidth.measure(bandwidth.weight_bytes(models.MODELS[model]), run.options["threads"]))
    print(f"read bandwidth: {run.bandwidth[BEYOND] / 1e9:.1f} GB/s", file=sys.stderr)


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
    per_token = [(r["finished_s"] - r["first_token_s"]) / max(1, r["num_tokens"] - 1) for r in requests]
    return Measurement(
        engine=engine.name,
        model=model,
        concurrency=concurrency,
        tp=engine.tp,
        ours=engine.ours,
        tokens_per_s=sum(request["num_tokens"] for request in requests) / answer["wall_s"],
        first_token_s=Spread.of([request["first_token_s"] for request in requests]),
        per_token_s=Spread.of(per_token),
        gap_s=Spread.of([gap for request in requests for gap in gaps(request["token_times_s"])] or per_token),
        peak_rss_bytes=running.peak_rss_bytes,
        load_s=running.load_s,
    )


def report(run: Run) -> None:
    shown = tables(run)
    more = run.state() | {"ratios": ratios(run.measurements)}
    write("engine", rows(run.measurements), *shown, command=run.command, found=run.versions, plots=plots(run), **more)


def _new_run(options: argparse.Namespace) -> Run:
    asked = {name: getattr(options, name) for name in ("engines", "models", "concurrency", "requests", "tokens", "threads")}
    return Run(asked, shlex.join(["python", "-m", "bench.engine", *sys.argv[1:]]))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(models.MODELS), choices=list(models.MODELS))
    parser.add_argument("--engines", nargs="+", default=list(engines()), choices=list(engines()))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="tokens in, and tokens out")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--bandwidth", action=argparse.BooleanOptionalAction, default=True, help="measure what memory allows")
    parser.add_argument("--resume", action="store_true", help="go on with the run that was cut, with its options")
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
