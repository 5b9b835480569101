"""Where the time of a decode step goes: `python -m bench.step_profile`.

Plain steps are timed at the seams: schedule, broadcast, model, deliver; sampling is timed again by itself, on the step's own
logits. The model's time is then dealt out by torch's profiler, over steps of their own because it slows what it watches: what its
operators leave of it is Python and dispatch. A runner that counts for itself is asked instead: its `profile()` gives the seconds
since it was loaded, by name. Between the steps, a buffer of the weights' size is read by as many threads: who else uses the machine
takes bandwidth from both alike, so that this share of the bound is the engine's own.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from bench import models
from bench.bandwidth import Reader, step_bytes, weight_bytes
from bench.harness import Row, Table, versions, write
from bench.parts import BROADCAST, PARTS, SAMPLING, Event, divide, sort_counters, sort_events
from bench.prompts import random_prompts
from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine.batch import Batch
from deployments.engine.engine import Engine
from deployments.engine.local import LocalEngine
from deployments.engine.messages import Request

if TYPE_CHECKING:
    from torch import Tensor

    from deployments.engine.shard import Shard


READ_EVERY = 5
"""Steps. The one behind a reading finds nothing in the caches; the median doesn't know it."""


@dataclass(frozen=True)
class Measurement:
    """Medians of a decode step's seconds, and of its parts. `slowed` is a watched step over a plain one, None where the runner
    counts for itself; then `counters` are its own, in seconds per step. `bytes_per_s` was read between the steps."""

    model: str
    tp: int
    running: int
    step_s: float
    parts: Mapping[str, float]
    slowed: float | None
    counters: Mapping[str, float]
    bytes_per_s: float
    step_bytes: int

    @property
    def of_bound(self) -> float:
        """The share of the step that reading its bytes takes at least."""
        return self.step_bytes / self.bytes_per_s / self.step_s


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    measured: list[Measurement] = []
    for model in options.models:  # each in a process of its own: a process joins one group of ranks
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            measured += process.submit(measure, model, options).result()
    shown = table(measured)
    shown.show()
    if not options.dry_run:
        name = "step_profile" if options.tp == 1 else f"step_profile_tp{options.tp}"
        command = shlex.join(["python", "-m", "bench.step_profile", *sys.argv[1:]])
        more: dict[str, Any] = {"unit": "milliseconds of a decode step", "measurements": [asdict(m) for m in measured]}
        found = versions(["torch", "transformers", "deepspeed"])
        print(write(name, rows(measured), shown, command=command, found=found, **more))


class Watch:
    """Runs a shard's steps, and notes when each passed its seams and what it sampled from."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self.mark: AbstractContextManager[object] = nullcontext()  # around the model
        self.scheduled = self.sent = self.ran = 0.0
        self.logits: Tensor | None = None

    def execute(self, batch: Batch) -> Tensor:
        self.scheduled = time.perf_counter()
        if self._shard.group:
            self._shard.group.send(batch.pack())
        self.sent = time.perf_counter()
        with self.mark:
            self.logits = self._shard.runner.run(batch)
        self.ran = time.perf_counter()
        return self.logits


def measure(model: str, options: argparse.Namespace) -> list[Measurement]:
    """Loads once, and runs every number of sequences."""
    threads = max(1, (os.cpu_count() or 1) // options.tp)
    settings = EngineSettings(
        max_sequences=max(options.running), kv_cache_bytes=2 << 30, prefix_cache=False, speculation=0, threads=threads
    )
    measured = []
    with LocalEngine(models.directory(model), tp=options.tp, dtype="bfloat16", settings=settings) as local:
        for running in options.running:
            measured.append(measure_steps(local, model, running, options))
            print(f"{model}, tp={options.tp}, {running}: {measured[-1].step_s * 1e3:.1f} ms", file=sys.stderr)
    return measured


def measure_steps(local: LocalEngine, model: str, running: int, options: argparse.Namespace) -> Measurement:
    watch, runner = Watch(local.shard), local.shard.runner
    engine = Engine.of(watch.execute, local.shard.spec.num_blocks, local.shard.spec.settings, sampler=local.shard.sampler)
    for request in requests(running, options.context, models.MODELS[model]["vocab_size"]):
        engine.add(request)
    while engine.scheduler.waiting or any(sequence.in_prompt for sequence in engine.scheduler.running):
        engine.step()
    for _ in range(3):
        engine.step()
    before = own_counters(runner)
    spec = models.MODELS[model]
    reader, speeds, plain = Reader(weight_bytes(spec), os.cpu_count() or 1), [], []
    for number in range(options.steps):
        if number % READ_EVERY == 0:
            speeds.append(reader.read())
        plain.append(plain_step(engine, watch))
    counters = {name: (total - before.get(name, 0.0)) / options.steps for name, total in own_counters(runner).items()}
    median = {part: statistics.median(step[part] for step in plain) for part in plain[0]}
    inside, slowed = sort_counters(counters), None
    if not counters:
        watched = [watched_step(engine, watch) for _ in range(options.watched)]
        sorted_events = [sort_events(events) for events, _ in watched]
        inside = {part: statistics.median(step[part] for step in sorted_events) for part in sorted_events[0]}
        slowed = statistics.median(seconds for _, seconds in watched) / median["step"]
    parts = divide(median["model"], inside, median["outside"], median[SAMPLING], median[BROADCAST])
    length = options.context + options.steps / 2
    read = statistics.median(speeds), step_bytes(spec, running, length)
    return Measurement(model, options.tp, running, median["step"], parts, slowed, counters, *read)


def requests(running: int, context: int, vocab_size: int) -> Iterator[Request]:
    """Greedy ones that don't end, with random prompts."""
    sampling = Sampling(temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(random_prompts(0, running, context, vocab_size)):
        yield Request(number, prompt, sampling, max_tokens=1024, stop_ids=[], seed=0)


def own_counters(runner: object) -> dict[str, float]:
    """Seconds since the runner was loaded, by name; empty for a runner that doesn't count."""
    profile = getattr(runner, "profile", None)
    return dict(profile()) if profile else {}


def plain_step(engine: Engine, watch: Watch) -> dict[str, float]:
    """Seconds of one step and between its seams; `outside` is what surrounds model and broadcast."""
    from deployments.engine.sampler import READABLE, sample

    began = time.perf_counter()
    engine.step()
    ended = time.perf_counter()
    sequences = list(engine.scheduler.running)
    assert watch.logits is not None
    assert len(watch.logits) == len(sequences), "not every sequence decoded in this step"
    again = time.perf_counter()
    sample(watch.logits, sequences, engine.sampler or READABLE)
    return {
        "step": ended - began,
        "model": watch.ran - watch.sent,
        BROADCAST: watch.sent - watch.scheduled,
        SAMPLING: time.perf_counter() - again,
        "outside": (watch.scheduled - began) + (ended - watch.ran),
    }


def watched_step(engine: Engine, watch: Watch) -> tuple[list[Event], float]:
    """What torch's profiler saw of a step, and how long the step took under its eyes."""
    import torch

    with marked_attention(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        watch.mark = torch.profiler.record_function("model")
        began = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - began
        watch.mark = nullcontext()
    return [Event(path_of(event), event.self_cpu_time_total / 1e6) for event in profiler.events()], seconds


def path_of(event: Any) -> list[str]:
    """A profiler's event and its callers, outermost first."""
    path = []
    while event is not None:
        path.append(event.name)
        event = event.cpu_parent
    return path[::-1]


@contextmanager
def marked_attention() -> Iterator[None]:
    """Lets the profiler see our attention as one event with all that it calls."""
    import torch
    from transformers import AttentionInterface

    from deployments.engine import attention

    def marked(*words: Any, **options: Any) -> Any:
        with torch.profiler.record_function("attention"):
            return attention.paged_attention(*words, **options)

    AttentionInterface.register(attention.NAME, marked)
    try:
        yield
    finally:
        attention.register()


def rows(measured: Sequence[Measurement]) -> list[Row]:
    """Others don't say where their time goes, so that there is no peer."""
    return [Row(m.model, m.running, m.tp, round(m.step_s * 1e3, 3), None, None, None) for m in measured]


def table(measured: Sequence[Measurement]) -> Table:
    """Milliseconds and, in brackets, percent of the step; parts that nobody has are left out."""
    parts = [part for part in PARTS if any(m.parts.get(part) for m in measured)]
    lines = []
    for m in measured:
        cells = [f"{m.parts[part] * 1e3:.2f} ({100 * m.parts[part] / m.step_s:.0f}%)" for part in parts]
        slowed = "-" if m.slowed is None else f"{m.slowed:.2f}"
        bound = [f"{m.bytes_per_s / 1e9:.1f}", f"{100 * m.of_bound:.0f}%"]
        lines.append([m.model, str(m.tp), str(m.running), f"{m.step_s * 1e3:.2f}", *cells, slowed, *bound])
    columns = ["model", "tp", "sequences", "step", *parts, "watched / plain", "read between, GB/s", "of the bound"]
    return Table("Milliseconds of a decode step by part (medians; percent of the step), bfloat16", columns, lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.step_profile", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(models.MODELS), choices=list(models.MODELS))
    parser.add_argument("--running", nargs="+", type=int, default=[1, 8, 32], help="decoding sequences")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--context", type=int, default=128, help="tokens that each has behind it")
    parser.add_argument("--steps", type=int, default=50, help="timed plainly")
    parser.add_argument("--watched", type=int, default=10, help="steps under the profiler")
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
