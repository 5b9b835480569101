"""What guessing by prompt lookup brings, and what it costs where it can't help: `python -m bench.speculation`.

One engine answers the same requests with guessing and without, in turns, as the default settings do it. The model has random
weights, so the temperature decides how often its text repeats itself: greedy it runs into loops, warm it says noise.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench import models
from bench.harness import Row, Table, compare, versions, write
from bench.prompts import random_prompts
from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine.local import LocalEngine
from deployments.engine.messages import Stats
from deployments.engine.speculation import Speculation

TEXTS = {"loops": 0.0, "repeats itself": 0.04, "noise": 1.0}
"""Temperatures."""


@dataclass(frozen=True)
class Work:
    """Closed loop: each of `concurrency` callers asks again as soon as it has its answer, `per_caller` times."""

    text: str
    concurrency: int
    per_caller: int = 2
    prompt_tokens: int = 128
    output_tokens: int = 256

    def prompts(self, vocab_size: int) -> list[list[int]]:
        return random_prompts(self.concurrency, self.concurrency * self.per_caller, self.prompt_tokens, vocab_size)

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_tokens=self.output_tokens, temperature=TEXTS[self.text], seed=1, ignore_eos=True)


@dataclass(frozen=True)
class Round:
    """All requests of a work answered once."""

    tokens: int
    seconds: float
    steps: int
    drafted: int
    accepted: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Measurement:
    """Medians over the rounds; counts are of all rounds with guessing."""

    text: str
    concurrency: int
    plain_tokens_per_s: float
    guessing_tokens_per_s: float
    tokens_per_step: float  # of one sequence
    drafted: int
    accepted: int

    @property
    def ratio(self) -> float:
        return self.guessing_tokens_per_s / self.plain_tokens_per_s


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    measured = []
    settings = EngineSettings(
        threads=max(1, options.threads // options.tp),
        max_sequences=max(options.concurrency),
        kv_cache_bytes=1 << 30,
        prefix_cache=False,
    )
    vocab_size = models.MODELS[options.model]["vocab_size"]
    with LocalEngine(models.directory(options.model), tp=options.tp, dtype="bfloat16", settings=settings) as engine:
        for text in options.texts:
            for concurrency in options.concurrency:
                work = Work(text, concurrency, output_tokens=options.tokens)
                measured.append(measure(engine, work, vocab_size, options.rounds))
                print(f"{text}, {concurrency}: {measured[-1].ratio:.2f}", file=sys.stderr)
    shown = table(measured)
    shown.show()
    if not options.dry_run:
        command = shlex.join(["python", "-m", "bench.speculation", *sys.argv[1:]])
        more: dict[str, Any] = {"unit": "output tokens per second", "measurements": [asdict(m) for m in measured]}
        found = versions(["torch", "deepspeed", "transformers"])
        print(write("speculation", rows(measured, options.model, options.tp), shown, command=command, found=found, **more))


def measure(engine: LocalEngine, work: Work, vocab_size: int, rounds: int) -> Measurement:
    """Rounds without and with guessing in turns, each first in every other, so that a slow minute of the machine meets both. What a
    round has taught about prices the next one knows, as in service."""
    prompts, speculation = work.prompts(vocab_size), Speculation(EngineSettings().speculation)
    plain, guessing = [], []
    _answer(engine, work, prompts[: work.concurrency], None)
    for number in range(rounds):
        turns = [(plain, None), (guessing, speculation)]
        for rounds_of, policy in turns if number % 2 == 0 else reversed(turns):
            rounds_of.append(_answer(engine, work, prompts, policy))
    return Measurement(
        work.text,
        work.concurrency,
        statistics.median(one.tokens_per_s for one in plain),
        statistics.median(one.tokens_per_s for one in guessing),
        sum(one.steps for one in plain) / sum(one.steps for one in guessing),
        sum(one.drafted for one in guessing),
        sum(one.accepted for one in guessing),
    )


def _answer(engine: LocalEngine, work: Work, prompts: list[list[int]], speculation: Speculation | None) -> Round:
    engine.engine.speculation = speculation
    before, began = engine.engine.stats(), time.perf_counter()
    engine.generate(prompts, work.sampling, concurrency=work.concurrency)
    return _between(before, engine.engine.stats(), time.perf_counter() - began)


def _between(before: Stats, after: Stats, seconds: float) -> Round:
    return Round(
        after.output_tokens - before.output_tokens,
        seconds,
        after.steps - before.steps,
        after.drafted_tokens - before.drafted_tokens,
        after.accepted_tokens - before.accepted_tokens,
    )


def rows(measured: Sequence[Measurement], model: str, tp: int) -> list[Row]:
    """The peer is the same engine without guessing."""
    stated = []
    for m in measured:
        peers = {"without guessing": m.plain_tokens_per_s}
        row = compare(m.guessing_tokens_per_s, peers, model=f"{model}: {m.text}", concurrency=m.concurrency, tp=tp)
        stated += [row] if row else []
    return stated


def table(measured: Sequence[Measurement]) -> Table:
    lines = [
        [
            m.text,
            str(m.concurrency),
            f"{m.plain_tokens_per_s:.0f}",
            f"{m.guessing_tokens_per_s:.0f}",
            f"{m.ratio:.2f}",
            str(m.drafted),
            f"{m.accepted / m.drafted:.2f}" if m.drafted else "-",
            f"{m.tokens_per_step:.2f}",
        ]
        for m in measured
    ]
    columns = ["text", "concurrency", "plain, tokens/s", "guessing, tokens/s", "ratio", "guessed", "accepted", "steps replaced"]
    return Table("Output tokens per second without and with prompt lookup, bfloat16 (medians over rounds)", columns, lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.speculation", description=__doc__)
    parser.add_argument("--model", choices=list(models.MODELS), default="S")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--texts", nargs="+", choices=list(TEXTS), default=list(TEXTS))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=256, help="output of each request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="over all ranks")
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
