"""What each way to choose tokens costs beside taking the best one: `python -m bench.sampling`.

One engine answers the same prompts in every way, in turns, without guesses: as many tokens each, all of a step's sequences in the
same way. The model is small, so that choosing is a large share of a step: what is lost here is the most that a model can lose.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench import models
from bench.harness import Row, Table, compare, versions, write
from bench.prompts import random_prompts
from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine.local import LocalEngine

BEST = "best token"
WAYS: Mapping[str, Mapping[str, Any]] = {
    BEST: {"temperature": 0.0},
    "dice": {"temperature": 1.0},
    "dice, top-k 50, top-p 0.9": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    "logprobs=0": {"temperature": 0.0, "logprobs": 0},
    "logprobs=5": {"temperature": 0.0, "logprobs": 5},
    "repetition penalty": {"temperature": 0.0, "repetition_penalty": 1.1},
    "frequency and presence penalty": {"temperature": 0.0, "frequency_penalty": 0.1, "presence_penalty": 0.1},
    "logit bias of 8 tokens": {"temperature": 0.0, "logit_bias": tuple((token, 1.0) for token in range(3, 11))},
}


@dataclass(frozen=True)
class Work:
    """Closed loop: each of `concurrency` callers asks again as soon as it has its answer, `per_caller` times."""

    concurrency: int
    per_caller: int = 2
    prompt_tokens: int = 128
    output_tokens: int = 128

    def prompts(self, vocab_size: int) -> list[list[int]]:
        return random_prompts(self.concurrency, self.concurrency * self.per_caller, self.prompt_tokens, vocab_size)

    def sampling(self, way: str) -> Sampling:
        return Sampling(max_tokens=self.output_tokens, seed=1, ignore_eos=True, **WAYS[way])


@dataclass(frozen=True)
class Measurement:
    """Medians over the rounds, by way."""

    concurrency: int
    tokens_per_s: dict[str, float]

    def ratio(self, way: str) -> float:
        return self.tokens_per_s[way] / self.tokens_per_s[BEST]


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    settings = EngineSettings(
        threads=options.threads, max_sequences=max(options.concurrency), kv_cache_bytes=1 << 30, prefix_cache=False, speculation=0
    )
    vocab_size = models.MODELS[options.model]["vocab_size"]
    measured = []
    with LocalEngine(models.directory(options.model), dtype="bfloat16", settings=settings) as engine:
        for concurrency in options.concurrency:
            measured.append(measure(engine, Work(concurrency, output_tokens=options.tokens), vocab_size, options.rounds))
            print(f"{concurrency}: {min(map(measured[-1].ratio, WAYS)):.2f} at worst", file=sys.stderr)
    shown = table(measured)
    shown.show()
    if not options.dry_run:
        command = shlex.join(["python", "-m", "bench.sampling", *sys.argv[1:]])
        more: dict[str, Any] = {"unit": "output tokens per second", "measurements": [asdict(m) for m in measured]}
        print(write("sampling", rows(measured, options.model), shown, command=command, found=versions(["torch"]), **more))


def measure(engine: LocalEngine, work: Work, vocab_size: int, rounds: int) -> Measurement:
    """All ways in turns, so that a slow minute of the machine meets each of them."""
    prompts = work.prompts(vocab_size)
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    engine.generate(prompts[: work.concurrency], work.sampling(BEST), concurrency=work.concurrency)
    for _ in range(rounds):
        for way, found in rates.items():
            before, began = engine.engine.stats().output_tokens, time.perf_counter()
            engine.generate(prompts, work.sampling(way), concurrency=work.concurrency)
            found.append((engine.engine.stats().output_tokens - before) / (time.perf_counter() - began))
    return Measurement(work.concurrency, {way: statistics.median(found) for way, found in rates.items()})


def rows(measured: Sequence[Measurement], model: str) -> list[Row]:
    """The peer is the same engine that takes the best token."""
    stated = []
    for m in measured:
        for way in WAYS:
            peer = {"the best token": m.tokens_per_s[BEST]}
            row = compare(m.tokens_per_s[way], peer, model=f"{model}: {way}", concurrency=m.concurrency, tp=1)
            stated += [row] if row and way != BEST else []
    return stated


def table(measured: Sequence[Measurement]) -> Table:
    lines = [[way, *(f"{m.tokens_per_s[way]:.0f} ({m.ratio(way):.2f})" for m in measured)] for way in WAYS]
    title = "Output tokens per second by way to choose them, bfloat16 (medians over rounds); in brackets: to the best token"
    return Table(title, ["way", *(f"{m.concurrency} at once" for m in measured)], lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.sampling", description=__doc__)
    parser.add_argument("--model", choices=list(models.MODELS), default="S")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128, help="output of each request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
