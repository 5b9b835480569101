"""How even the stream of 8 answers stays while a prompt of 4,096 tokens enters beside them: `python -m bench.flatness`.

Chunked prefill trades the newcomer's first token against the others' pauses; the budget of a step sets the rate. Each policy gets
the same work in the same process: fixed budgets of tokens, one of time (`engine.step_target_ms`), and both, the engine's default.
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench import models, plot
from bench.harness import HERE, Row, Table, versions, write
from bench.long_context import WINDOW
from bench.prompts import random_tokens
from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine.chunking import Chunking
from deployments.engine.engine import Engine, Execute
from deployments.engine.local import LocalEngine
from deployments.engine.messages import Request

LONG = -1
"""The long prompt's request; the decoders' count from 0."""
STEPS_AROUND = 24
"""Steps of the decoders alone, before the prompt comes and after it is in."""


class Policy(Protocol):
    """What the engine asks before a step, and tells after it."""

    def budget(self, decoders: int) -> int:
        """Tokens of the next step."""

    def learn(self, decoders: int, prompt_tokens: int, seconds: float) -> None:
        """What a step held and took."""


@dataclass(frozen=True)
class Gap:
    """Between two tokens of one decoder, in seconds; `ended_s` is the clock at the second."""

    request: int
    ended_s: float
    seconds: float


@dataclass(frozen=True)
class Measurement:
    """One policy. Gaps are those between the long prompt's arrival and its first token; `alone_*` are without the other."""

    model: str
    policy: str
    decoders: int
    alone_gap_p50_ms: float
    gap_p50_ms: float
    gap_p99_ms: float
    gap_max_ms: float
    first_token_ms: float
    alone_first_token_ms: float
    tokens_per_s: float


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    work = Work(prompt_tokens=options.prompt_tokens)
    measured: list[Measurement] = []
    for model in options.models:
        gaps = {}
        with LocalEngine(
            models.directory(model, context=WINDOW), dtype="bfloat16", settings=work.settings, blocks=work.num_blocks
        ) as local:
            for name, policy in policies(work.prompt_tokens, work.decoders, options.target_ms / 1e3).items():
                measurement, gaps[name] = measure(local.shard.execute, name, policy, work, model)
                measured.append(measurement)
                print(f"{model}, {name}: p99 {measurement.gap_p99_ms:.0f} ms", file=sys.stderr)
        if not options.dry_run:
            draw(HERE / "results" / f"flatness-{model}.svg", model, gaps)
    shown = table(measured, work.prompt_tokens)
    shown.show()
    if not options.dry_run:
        command = shlex.join(["python", "-m", "bench.flatness", *sys.argv[1:]])
        unit = "milliseconds, p99 between two tokens of a decoder while the long prompt enters"
        more: dict[str, Any] = {"unit": unit, "work": asdict(work), "measurements": [asdict(m) for m in measured]}
        print(write("flatness", rows(measured), shown, command=command, found=versions(["torch", "transformers"]), **more))


def policies(prompt_tokens: int, decoders: int, target_s: float) -> dict[str, Policy]:
    """Chunks of so many tokens; of so much time, which may take the whole prompt; and both, as the engine does by default."""
    whole, default = prompt_tokens + decoders, EngineSettings()
    fixed: dict[str, Policy] = {f"{budget} tokens": Chunking(budget, 0) for budget in (64, 256, 1024)}
    fixed["whole prompt"] = Chunking(whole, 0)
    fixed[f"within {target_s * 1e3:.0f} ms"] = Chunking(whole, target_s)
    return fixed | {"default": Chunking(default.max_batch_tokens, default.step_target_ms / 1e3)}


@dataclass(frozen=True)
class Work:
    """Decoders that have `context` tokens behind them, and a prompt that comes."""

    decoders: int = 8
    context: int = 128
    prompt_tokens: int = 4096

    def prompt(self, number: int, vocab_size: int) -> list[int]:
        length = self.prompt_tokens if number == LONG else self.context
        return random_tokens(random.Random(number), length, vocab_size)

    @property
    def most_output(self) -> int:
        """A decoder never ends while the prompt enters, however small its chunks."""
        return self.prompt_tokens

    @property
    def settings(self) -> EngineSettings:
        most = self.prompt_tokens + self.decoders * (self.context + 1)
        return EngineSettings(max_sequences=self.decoders + 1, max_batch_tokens=most, prefix_cache=False, speculation=0)

    @property
    def num_blocks(self) -> int:
        """All that could be wanted at once: nothing is preempted."""
        longest = [self.prompt_tokens + 1] + [self.context + self.most_output] * self.decoders
        return sum(-(-tokens // self.settings.block_size) for tokens in longest)


class Trial:
    """An engine under a policy; notes when each request got its tokens."""

    def __init__(self, execute: Execute, policy: Policy, work: Work) -> None:
        self.engine = Engine.of(execute, work.num_blocks, work.settings)
        self.engine.chunking = policy
        self._last: dict[int, float] = {}  # of every request that decodes
        self.gaps: list[Gap] = []

    def add(self, number: int, prompt: list[int], max_tokens: int) -> None:
        sampling = Sampling(temperature=0.0, ignore_eos=True)
        self.engine.add(Request(number, prompt, sampling, max_tokens, stop_ids=[], seed=0))

    def become(self, policy: Policy) -> None:
        """From now on under another policy, which sees some steps of the decoders alone first."""
        self.engine.chunking = policy
        for _ in range(STEPS_AROUND):
            self.step()

    def step(self) -> set[int]:
        """The requests that got a token."""
        outputs = self.engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.request_id in self._last:
                self.gaps.append(Gap(output.request_id, now, now - self._last[output.request_id]))
            self._last[output.request_id] = now
            if output.finish_reason:
                del self._last[output.request_id]
        return {output.request_id for output in outputs}

    def until(self, request: int) -> float:
        """Steps until a request gets a token; the seconds that it took."""
        began = time.perf_counter()
        while request not in self.step():
            pass
        return time.perf_counter() - began


def measure(execute: Execute, name: str, policy: Policy, work: Work, model: str) -> tuple[Measurement, list[Gap]]:
    """The long prompt alone, then beside the decoders. The gaps count from its arrival."""
    vocab_size = models.MODELS[model]["vocab_size"]
    alone = Trial(execute, policy, work)
    alone.add(LONG, work.prompt(LONG, vocab_size), max_tokens=1)
    alone_s = alone.until(LONG)
    trial = Trial(execute, Chunking(work.settings.max_batch_tokens, 0), work)
    for number in range(work.decoders):
        trial.add(number, work.prompt(number, vocab_size), max_tokens=work.most_output)
    trial.step()
    trial.become(policy)
    trial.add(LONG, work.prompt(LONG, vocab_size), max_tokens=1)
    arrived = time.perf_counter()
    first_s = trial.until(LONG)
    for _ in range(STEPS_AROUND):
        trial.step()
    gaps = [Gap(gap.request, gap.ended_s - arrived, gap.seconds) for gap in trial.gaps]
    return summarise(gaps, name, model, work.decoders, first_s, alone_s), gaps


def summarise(gaps: Sequence[Gap], policy: str, model: str, decoders: int, first_s: float, alone_s: float) -> Measurement:
    before, beside = ([g.seconds * 1e3 for g in gaps if low < g.ended_s <= high] for low, high in ((-np.inf, 0), (0, first_s)))
    return Measurement(
        model=model,
        policy=policy,
        decoders=decoders,
        alone_gap_p50_ms=float(np.percentile(before, 50)),
        gap_p50_ms=float(np.percentile(beside, 50)),
        gap_p99_ms=float(np.percentile(beside, 99)),
        gap_max_ms=max(beside),
        first_token_ms=first_s * 1e3,
        alone_first_token_ms=alone_s * 1e3,
        tokens_per_s=len(beside) / first_s,
    )


def draw(path: Path, model: str, gaps: Mapping[str, Sequence[Gap]]) -> None:
    """One decoder's gaps under each policy: the others get their tokens in the same steps."""
    series = {name: [(gap.ended_s, gap.seconds * 1e3) for gap in some if gap.request == 0] for name, some in gaps.items()}
    title = f"Time between tokens of a decoder; a long prompt arrives at 0 (model {model})"
    plot.lines(path, title, "seconds", "milliseconds since the token before", series, log_y=True)


def rows(measured: Sequence[Measurement]) -> list[Row]:
    """Policies of one engine, so that there is no peer."""
    return [Row(f"{m.model}: {m.policy}", m.decoders, 1, round(m.gap_p99_ms, 3), None, None, None) for m in measured]


def table(measured: Sequence[Measurement], prompt_tokens: int) -> Table:
    lines = []
    for m in measured:
        gaps = (m.alone_gap_p50_ms, m.gap_p50_ms, m.gap_p99_ms, m.gap_max_ms)
        first = (m.first_token_ms, m.alone_first_token_ms)
        lines.append([m.model, m.policy, *(f"{ms:.0f}" for ms in (*gaps, *first)), f"{m.tokens_per_s:.0f}"])
    columns = ["model", "budget of a step", "gap before", "p50 beside", "p99", "max", "first token", "alone", "tokens/s beside"]
    decoders = ", ".join(map(str, sorted({m.decoders for m in measured})))
    title = f"Milliseconds between tokens of {decoders} decoders while a prompt of {prompt_tokens:,} tokens enters, bfloat16"
    return Table(title, columns, lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.flatness", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["S"], choices=list(models.MODELS))
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--target-ms", type=float, default=150.0, help="of a step, for the policy that goes by time alone")
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
