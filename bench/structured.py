"""What it costs to hold answers to a JSON schema: `python -m bench.structured`.

One engine answers the same prompts freely and held to a schema, in turns, as many tokens each: the schema is an array that
doesn't end before them. `forced` also tries the tokens that the schema leaves no choice about as guesses, where that is measured
to pay; that is how the default settings serve. The model has random weights and throws dice between what it may say, so a schema
meets more of its ways than with a trained model. Then the time that the masks of a step take, and that a schema takes to compile.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import models
from bench.harness import Row, Spread, Table, compare, versions, write
from bench.prompts import random_prompts
from cluster.settings import EngineSettings
from cluster.types import Constraint, Sampling
from deployments.engine.local import LocalEngine
from deployments.engine.speculation import Speculation
from deployments.engine.structured import Allowed, Grammars, Matcher

NAME: dict[str, Any] = {"type": "string", "maxLength": 24}
ORDER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "customer_name": NAME,
        "status": {"enum": ["pending", "shipped", "delivered"]},
        "quantity": {"type": "integer", "minimum": 1, "maximum": 999},
        "unit_price": {"type": "number", "minimum": 0, "maximum": 1e6},
        "is_gift": {"type": "boolean"},
    },
    "required": ["customer_name", "status", "quantity", "unit_price", "is_gift"],
    "additionalProperties": False,
}
ENDLESS: dict[str, Any] = {"type": "array", "items": ORDER, "minItems": 2000}
CORPUS: dict[str, Any] = {
    "object": {"type": "object"},
    "order": ORDER,
    "orders": {"type": "array", "items": ORDER, "maxItems": 100},
    "union": {"anyOf": [ORDER, {"type": "array", "items": NAME}, {"type": "null"}]},
    "tree": {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"},
    "pattern": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4,8}( [a-z]+){1,5}$"},
    "formats": {
        "type": "array",
        "items": {"anyOf": [{"type": "string", "format": f} for f in ("date-time", "email", "uri", "ipv6")]},
    },
    "long text": {"type": "string", "minLength": 100, "maxLength": 5000},
    "900 values": {"enum": [f"value {number}" for number in range(900)]},
    "200 properties": {
        "type": "object",
        "properties": {f"p{number}": NAME for number in range(200)},
        "additionalProperties": False,
    },
}
WAYS = ("free", "held", "forced")


@dataclass(frozen=True)
class Work:
    """Closed loop: each of `concurrency` callers asks again as soon as it has its answer, `per_caller` times."""

    concurrency: int
    per_caller: int = 2
    prompt_tokens: int = 64
    output_tokens: int = 192

    def prompts(self, vocab_size: int) -> list[list[int]]:
        return random_prompts(self.concurrency, self.concurrency * self.per_caller, self.prompt_tokens, vocab_size)

    def sampling(self, way: str) -> Sampling:
        constraint = None if way == "free" else Constraint("json_schema", json.dumps(ENDLESS))
        return Sampling(max_tokens=self.output_tokens, temperature=1.0, seed=1, ignore_eos=True, constraint=constraint)


@dataclass(frozen=True)
class Measurement:
    """Medians over the rounds; mask times are of whole steps of the way `held`, in microseconds for each sequence."""

    concurrency: int
    tokens_per_s: dict[str, float]
    mask_us: float
    mask_p99_us: float
    forced_share: float  # of the tokens of the way `forced`, those that were guessed and right

    @property
    def ratio(self) -> float:
        return self.tokens_per_s["forced"] / self.tokens_per_s["free"]


class Timed(Grammars):
    """Notes how long the masks of each step took."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.seconds: list[float] = []

    def allowed(self, matchers: Sequence[Matcher], width: int) -> Allowed:
        began = time.perf_counter()
        found = super().allowed(matchers, width)
        self.seconds.append((time.perf_counter() - began) / len(matchers))
        return found


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    directory = models.directory(options.model)
    settings = EngineSettings(
        threads=options.threads, max_sequences=max(options.concurrency), kv_cache_bytes=1 << 30, prefix_cache=False
    )
    vocab_size = models.MODELS[options.model]["vocab_size"]
    measured = []
    with LocalEngine(directory, dtype="bfloat16", settings=settings) as engine:
        engine.engine.grammars = grammars = Timed(directory)
        for concurrency in options.concurrency:
            measured.append(measure(engine, grammars, Work(concurrency, output_tokens=options.tokens), vocab_size, options.rounds))
            print(f"{concurrency}: {measured[-1].ratio:.2f}", file=sys.stderr)
    compiled = compile_times(Grammars(directory), CORPUS, options.compiles)
    shown, times = table(measured), compile_table(compiled)
    shown.show()
    times.show()
    if not options.dry_run:
        command = shlex.join(["python", "-m", "bench.structured", *sys.argv[1:]])
        more: dict[str, Any] = {
            "unit": "output tokens per second",
            "measurements": [asdict(m) for m in measured],
            "compile_s": {name: asdict(spread) for name, spread in compiled.items()},
        }
        found = versions(["torch", "llguidance"])
        print(write("structured", rows(measured, options.model), shown, times, command=command, found=found, **more))


def measure(engine: LocalEngine, grammars: Timed, work: Work, vocab_size: int, rounds: int) -> Measurement:
    """All ways in turns, so that a slow minute of the machine meets each of them."""
    prompts, speculation = work.prompts(vocab_size), Speculation(EngineSettings().speculation)
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    engine.engine.speculation = speculation
    engine.generate(prompts[: work.concurrency], work.sampling("forced"), concurrency=work.concurrency)
    masks: list[float] = []
    accepted = tokens = 0
    for _ in range(rounds):
        for way in WAYS:
            engine.engine.speculation = None if way == "held" else speculation
            grammars.seconds.clear()
            before, began = engine.engine.stats(), time.perf_counter()
            engine.generate(prompts, work.sampling(way), concurrency=work.concurrency)
            seconds, after = time.perf_counter() - began, engine.engine.stats()
            rates[way].append((after.output_tokens - before.output_tokens) / seconds)
            if way == "held":
                masks += grammars.seconds
            elif way == "forced":
                accepted += after.accepted_tokens - before.accepted_tokens
                tokens += after.output_tokens - before.output_tokens
    spread = Spread.of(masks)
    medians = {way: statistics.median(found) for way, found in rates.items()}
    return Measurement(work.concurrency, medians, spread.p50 * 1e6, spread.p99 * 1e6, accepted / tokens)


def compile_times(grammars: Grammars, schemas: dict[str, Any], repetitions: int) -> dict[str, Spread]:
    """Seconds, each time anew."""
    found = {}
    for name, schema in schemas.items():
        constraint, seconds = Constraint("json_schema", json.dumps(schema)), []
        grammars.compile(constraint)  # the first one of all reads the vocabulary
        for _ in range(repetitions):
            began = time.perf_counter()
            assert grammars.compile(constraint), name
            seconds.append(time.perf_counter() - began)
        found[name] = Spread.of(seconds)
    return found


def rows(measured: Sequence[Measurement], model: str) -> list[Row]:
    """The peer is the same engine without a schema."""
    stated = []
    for m in measured:
        row = compare(
            m.tokens_per_s["forced"], {"without a schema": m.tokens_per_s["free"]}, model=model, concurrency=m.concurrency, tp=1
        )
        stated += [row] if row else []
    return stated


def table(measured: Sequence[Measurement]) -> Table:
    lines = [
        [
            str(m.concurrency),
            *(f"{m.tokens_per_s[way]:.0f}" for way in WAYS),
            f"{m.ratio:.2f}",
            f"{m.forced_share:.2f}",
            f"{m.mask_us:.0f}",
            f"{m.mask_p99_us:.0f}",
        ]
        for m in measured
    ]
    columns = [
        "concurrency",
        "free, tokens/s",
        "held, tokens/s",
        "forced, tokens/s",
        "forced of free",
        "guessed",
        "mask, us",
        "mask p99, us",
    ]
    return Table("Output tokens per second without and with a schema, bfloat16 (medians over rounds)", columns, lines)


def compile_table(compiled: dict[str, Spread]) -> Table:
    lines = [[name, f"{spread.p50 * 1e3:.2f}", f"{spread.most * 1e3:.2f}"] for name, spread in compiled.items()]
    return Table("Milliseconds to compile a schema", ["schema", "p50", "most"], lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.structured", description=__doc__)
    parser.add_argument("--model", choices=list(models.MODELS), default="S")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=192, help="output of each request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiles", type=int, default=20, help="of each schema")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dry-run", action="store_true", help="show the tables and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
