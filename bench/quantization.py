"""What weights in eight bits cost in exactness and bring in speed: `python -m bench.quantization`.

Exactness on a small model that has learned something (`learned.py`), over text that it never saw: perplexity, and how far its
predictions move from those of float32. Speed on S and M, whose weights are random, engines answering the same requests in turns.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import learned, models
from bench.engines import Engine, Running, engines
from bench.harness import Row, Table, compare, versions, write
from bench.prompts import random_prompts

if TYPE_CHECKING:
    from torch import Tensor

    from cluster.types import Quantization
    from deployments.engine.native.decoder import Decoder
    from deployments.engine.runner import Runner

PLAIN, OURS, OPENVINO = "mmaas bfloat16", "mmaas int8", "openvino-genai int8"
BLOCK = 16


@dataclass(frozen=True)
class Precision:
    """How the small model computes. `simulated`: through torch, where the decoder has no such numbers."""

    name: str
    dtype: str
    quantization: Quantization | None = None
    simulated: bool = False


PRECISIONS = (
    Precision("float32", "float32"),
    Precision("bfloat16", "bfloat16"),
    Precision("int8", "bfloat16", "int8"),
    Precision("int8 through torch", "bfloat16", "int8", simulated=True),
    Precision("fp8, simulated", "bfloat16", "fp8", simulated=True),
)


@dataclass(frozen=True)
class Exactness:
    """Over all predictions of the held-out text; the last two beside float32."""

    name: str
    perplexity: float
    divergence: float  # mean Kullback-Leibler divergence, in nats
    agreement: float  # share of predictions whose most likely token is the same


@dataclass(frozen=True)
class Speed:
    """Medians over rounds. `peak_bytes` of the process with all that it started."""

    engine: str
    model: str
    concurrency: int
    tokens_per_s: float
    peak_bytes: int


@dataclass(frozen=True)
class Work:
    """Closed loop: each of `concurrency` callers asks again as soon as it has its answer, `per_caller` times."""

    concurrency: int
    per_caller: int
    prompt_tokens: int = 128
    output_tokens: int = 128

    def prompts(self, vocab_size: int) -> list[list[int]]:
        return random_prompts(self.concurrency, self.concurrency * self.per_caller, self.prompt_tokens, vocab_size)


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    exact = exactness(options.rows) if options.rows else []
    speeds: list[Speed] = []
    found = versions(["torch", "deepspeed", "transformers"])
    for model in options.models:
        speeds += measure(model, options, found)
    tables = [table for table, filled in ((exactness_table(exact), exact), (speed_table(speeds), speeds)) if filled]
    for table in tables:
        table.show()
    if not options.dry_run:
        command = shlex.join(["python", "-m", "bench.quantization", *sys.argv[1:]])
        more: dict[str, Any] = {"exactness": [asdict(one) for one in exact], "measurements": [asdict(one) for one in speeds]}
        print(write("quantization", rows(speeds), *tables, command=command, found=found, unit="output tokens per second", **more))


def exactness(num_rows: int) -> list[Exactness]:
    directory = learned.directory()
    text = learned.held_out(directory, num_rows)
    found: list[Exactness] = []
    reference: Tensor | None = None
    for precision in PRECISIONS:
        predictions = _predictions(_runner(directory, precision), text)
        reference = predictions if reference is None else reference
        found.append(compared(precision.name, predictions, reference, text))
        print(f"{precision.name}: perplexity {found[-1].perplexity:.4f}", file=sys.stderr)
    return found


def compared(name: str, predictions: Tensor, reference: Tensor, text: Tensor) -> Exactness:
    """`rows x (tokens - 1) x vocabulary` log probabilities, beside those of float32."""
    loss = -predictions.gather(2, text[:, 1:, None]).mean()
    divergence = (reference.exp() * (reference - predictions)).sum(-1).mean()
    same = predictions.argmax(-1) == reference.argmax(-1)
    return Exactness(name, math.exp(float(loss)), float(divergence), float(same.float().mean()))


def _runner(directory: Path, precision: Precision) -> Runner | Decoder:
    from cluster.settings import EngineSettings
    from deployments.engine.attention import KvCache
    from deployments.engine.native.proof import Ranks, decoder_of
    from deployments.engine.quantized_linear import quantize_model
    from deployments.engine.runner import Runner, load_model

    model = load_model(directory, precision.dtype)
    if precision.quantization:
        quantize_model(model, precision.quantization)
    runner = Runner(model, KvCache(learned.WINDOW // BLOCK, BLOCK))
    runner.check()
    if precision.simulated:
        return runner
    threads, cache = os.cpu_count() or 1, EngineSettings().cache
    blocks = learned.WINDOW // BLOCK
    return decoder_of(runner, num_blocks=blocks, max_positions=learned.WINDOW, threads=threads, cache=cache, ranks=Ranks())


def _predictions(runner: Runner | Decoder, text: Tensor) -> Tensor:
    """Log probabilities of every next token, row by row through the engine's own runner."""
    import numpy as np
    import torch

    from deployments.engine.batch import Batch

    found = []
    for row in text.numpy().astype(np.int32):
        one, every = np.array([len(row)], np.int32), np.zeros(len(row), np.int32)
        batch = Batch(row, np.zeros(1, np.int32), one, every, np.arange(len(row) // BLOCK, dtype=np.int32)[None])
        found.append(torch.log_softmax(runner.run(batch).float(), -1)[:-1])
    return torch.stack(found)


def measure(model: str, options: argparse.Namespace, found: dict[str, str]) -> list[Speed]:
    """All engines hold the model at once and answer in turns, so that a slow minute of the machine meets every one."""
    directory, vocab_size = models.directory(model), models.MODELS[model]["vocab_size"]
    speeds = []
    with ExitStack() as stack:
        running = {}
        for name, (engine, more) in contenders().items():
            limits = {"threads": options.threads, "max_concurrency": max(options.concurrency)}
            try:
                running[name] = stack.enter_context(Running(engine, directory, more=more, **limits))
            except RuntimeError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            found |= running[name].versions
        for concurrency in options.concurrency:
            work = Work(concurrency, options.per_caller)
            rates: dict[str, list[float]] = {name: [] for name in running}
            for number in range(options.rounds + 1):
                for name, engine in running.items():
                    answer = engine.run(work.prompts(vocab_size), work.output_tokens, concurrency)
                    if number:  # the first warms up
                        rates[name].append(sum(request["num_tokens"] for request in answer["requests"]) / answer["wall_s"])
            for name, measured in rates.items():
                speeds.append(Speed(name, model, concurrency, statistics.median(measured), running[name].peak_rss_bytes))
            print(
                f"{model}, {concurrency}: { ({name: round(statistics.median(r)) for name, r in rates.items()}) }", file=sys.stderr
            )
    return speeds


def contenders() -> dict[str, tuple[Engine, list[str]]]:
    """Those that are installed. vLLM takes int8 on a CPU only from checkpoints that were quantised beforehand."""
    known, int8 = engines(), ["--quantization", "int8"]
    found = {PLAIN: (known["mmaas tp=1"], []), OURS: (known["mmaas tp=1"], int8), OPENVINO: (known["openvino-genai"], int8)}
    return {name: pair for name, pair in found.items() if pair[0].is_installed}


def rows(speeds: Sequence[Speed]) -> list[Row]:
    """Ours in eight bits against ours in sixteen, and the peer's."""
    stated = []
    for model, concurrency in dict.fromkeys((one.model, one.concurrency) for one in speeds):
        rates = _rates(speeds, model, concurrency)
        row = compare(rates.pop(OURS), rates, model=model, concurrency=concurrency, tp=1)
        stated += [row] if row else []
    return stated


def exactness_table(exact: Sequence[Exactness]) -> Table:
    lines = [
        [
            one.name,
            f"{one.perplexity:.4f}",
            f"{100 * (one.perplexity / exact[0].perplexity - 1):+.3f}%",
            f"{one.divergence:.2g}",
            f"{100 * one.agreement:.2f}%",
        ]
        for one in exact
    ]
    columns = ["weights", "perplexity", "beside float32", "divergence, nats", "same best token"]
    return Table("Perplexity of a small trained model on held-out text", columns, lines)


def speed_table(speeds: Sequence[Speed]) -> Table:
    lines = []
    for model, concurrency in dict.fromkeys((one.model, one.concurrency) for one in speeds):
        rates = _rates(speeds, model, concurrency)
        memory = {one.engine: one.peak_bytes / (1 << 30) for one in speeds if (one.model, one.concurrency) == (model, concurrency)}
        peer = [f"{rates[OPENVINO]:.0f}", f"{rates[OURS] / rates[OPENVINO]:.2f}"] if OPENVINO in rates else ["-", "-"]
        speed = [f"{rates[PLAIN]:.0f}", f"{rates[OURS]:.0f}", f"{rates[OURS] / rates[PLAIN]:.2f}", *peer]
        lines.append([model, str(concurrency), *speed, f"{memory[PLAIN]:.1f}", f"{memory[OURS]:.1f}"])
    columns = ["model", "concurrency", "bfloat16", "int8", "ratio", "openvino-genai int8", "int8 / openvino-genai"]
    memory_columns = ["memory bfloat16, GiB", "memory int8, GiB"]
    return Table("Output tokens per second (medians over rounds)", [*columns, *memory_columns], lines)


def _rates(speeds: Sequence[Speed], model: str, concurrency: int) -> dict[str, float]:
    return {one.engine: one.tokens_per_s for one in speeds if (one.model, one.concurrency) == (model, concurrency)}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.quantization", description=__doc__)
    parser.add_argument(
        "--models", nargs="*", choices=list(models.MODELS), default=list(models.MODELS), help="none: only exactness"
    )
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--per-caller", type=int, default=2, help="requests of each caller")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64, help="rows of held-out text; 0: only speed")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dry-run", action="store_true", help="show the tables and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
