"""Thousands of requests of every kind through one engine, and nothing of them left: `python -m bench.soak`.

Random lengths, sampling parameters, choices and tenants on a tiny model whose KV cache is far too small for them, answers of a
given form and forced calls, more adapters than slots, prompts that poison their sequence, and callers that hang up at every
moment. Whatever is wrong ends the run with an AssertionError: an answer too many or too few, one that differs from the answer to
the same request before or hasn't its form, a healthy one that fails, a block or adapter that isn't given back, a request,
sequence or matcher that is still in memory. Growing memory ends the program with an error. One seed gives the same requests; when
one enters depends on the threads that read adapters and compile forms.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from bench import plot
from bench.engines import rss_bytes, tree
from bench.harness import HERE, Row, Table, versions, write
from bench.slope import Slope, slope
from bench.soak_entrance import Entrance
from bench.soak_forms import Form
from bench.soak_model import adapters, build
from bench.soak_requests import KINDS, NUM_KNOWN, Kind, Leaves, Plan, plans
from cluster.settings import EngineSettings
from cluster.types import FinishReason
from deployments.engine.engine import Engine, Output, Request
from deployments.engine.local import LocalEngine
from deployments.engine.sequence import Sequence as EngineSequence
from deployments.engine.structured import Matcher
from deployments.engine.tokenizer import Tokenizer

MOST_MB_PER_MINUTE = 1.0
WARM_UP = 0.25
"""Share of the time before memory is watched: by then every shape of batch has been seen."""
SAMPLE_S, LEAST_SAMPLES, SHOWN_SAMPLES = 0.25, 240, 200
IN_FLIGHT = 40
CHECK_STEPS = 50
ROUND = 1000
"""Requests until the engine is let run empty once."""
NUM_BLOCKS = 22
SETTINGS = EngineSettings(block_size=16, max_sequences=16, max_batch_tokens=64)


@dataclass(slots=True)
class Open:
    """A request in the engine: what it has answered, the choices that go on, and whether its caller is still to hang up."""

    plan: Plan
    tokens: list[list[int]]
    going_on: set[int]
    leaves: Leaves | None

    @classmethod
    def of(cls, plan: Plan) -> Open:
        n = plan.request.sampling.n
        return cls(plan, [[] for _ in range(n)], set(range(n)), plan.leaves)

    def would_leave(self, in_prompt: bool | None) -> bool:
        """Whether now is the moment. `in_prompt` is None while none of its sequences runs."""
        longest = max(map(len, self.tokens))
        match self.leaves:
            case "while waiting":
                return in_prompt is None and longest == 0
            case "in the prompt":
                return bool(in_prompt) and longest == 0
            case "after the first token":
                return longest == 1
            case "one choice":
                return longest >= 1 and len(self.tokens) > 1
        return longest >= 5


@dataclass
class Soak:
    """Keeps `IN_FLIGHT` requests in an engine, takes their answers, hangs up where the plan says so, and checks all the time."""

    engine: Engine
    requests: Iterator[Plan]
    held: Callable[[], tuple[int, int, int]] = field(default=lambda: retained())
    entrance: Entrance | None = None  # None: everybody enters at once
    tokenizer: Tokenizer | None = None  # where answers have forms
    poison: int | None = None  # the token that makes logits no numbers
    added: int = 0
    answered: int = 0
    hung_up: int = 0  # requests of which nothing went on after an abort
    left: Counter[Leaves] = field(default_factory=Counter)
    repeated: int = 0  # choices whose answer was known before
    cut_off: int = 0  # choices that were aborted in the engine
    failed: int = 0  # choices that were poisoned
    formed: Counter[str] = field(default_factory=Counter)  # complete answers of each kind of form
    unfinished_forms: int = 0  # choices that had no more tokens for their form
    adapted: int = 0  # requests with an adapter
    output_tokens: int = 0
    integrity_checks: int = 0
    _open: dict[int, Open] = field(default_factory=dict)
    _known: dict[tuple[int, int], tuple[list[int], str]] = field(default_factory=dict)
    _round_ends: int = 0
    _held_before: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        self._held_before = self.held()

    @property
    def ended(self) -> int:
        return self.answered + self.hung_up

    def run(self, after_step: Callable[[], None]) -> None:
        steps = 0
        while self._admit():
            for output in self.engine.step():
                self._take(output)
            self._hang_up()
            if self.entrance:
                self.entrance.turn()
            steps += 1
            if steps % CHECK_STEPS == 0:
                self.engine.scheduler.check_integrity()
                self.integrity_checks += 1
            after_step()
        assert self.ended == self.added, f"{self.added} requests, {self.ended} ends"

    def _admit(self) -> bool:
        """Fill up, and let everything end between two rounds. Whether there is anything to do."""
        if not self._open:
            self._check_idle()
            self._round_ends = self.added + ROUND
        while len(self._open) < IN_FLIGHT and self.added < self._round_ends and (plan := next(self.requests, None)):
            if self.entrance:
                self.entrance.add(plan.request, plan.adapter)
            else:
                self.engine.add(plan.request)
            self._open[plan.request.id] = Open.of(plan)
            self.added += 1
            self.adapted += plan.adapter is not None
        return bool(self._open)

    def _take(self, output: Output) -> None:
        number, request = output.request_id, self._open.get(output.request_id)
        assert request, f"request {number} got a token after its end"
        assert output.index in request.going_on, f"choice {output.index} of request {number} got a token after its end"
        is_poisoned = self._is_poisoned(request, output.index)
        assert is_poisoned == (output.finish_reason == "error"), f"request {number} is {'' if is_poisoned else 'not '}poisoned"
        if is_poisoned:
            self.failed += 1
        else:
            request.tokens[output.index].append(output.token)
            self.output_tokens += 1
        if output.finish_reason:
            self._check_end(request, output, output.finish_reason)
            request.going_on.discard(output.index)
        if not request.going_on:
            self._end(number)
            self.answered += 1

    def _is_poisoned(self, request: Open, index: int) -> bool:
        return self.poison is not None and (self.poison in request.plan.request.prompt or self.poison in request.tokens[index])

    def _end(self, number: int) -> None:
        del self._open[number]
        if self.entrance:
            self.entrance.ended(number)

    def _check_end(self, request: Open, output: Output, reason: FinishReason) -> None:
        wanted, tokens = request.plan.request, request.tokens[output.index]
        if reason == "length":
            assert len(tokens) == wanted.max_tokens, f"request {wanted.id} ended after {len(tokens)} tokens"
        if request.plan.form:
            self._check_form(request.plan.form, tokens, reason)
        elif reason != "error":
            met_stop = output.token in wanted.stop_ids and len(tokens) > wanted.sampling.min_tokens
            assert met_stop == (reason == "stop"), f"request {wanted.id} ended for another reason"
        if request.plan.known is not None:
            answer = tokens, str(reason)
            first = self._known.setdefault((request.plan.known, output.index), answer)
            assert answer == first, f"request {wanted.id} has another answer than before"
            self.repeated += answer is not first

    def _check_form(self, form: Form, tokens: list[int], reason: FinishReason) -> None:
        assert self.tokenizer, "forms are forms of text"
        if reason == "stop":
            form.check(self.tokenizer.decode(tokens))
            self.formed[form.kind] += 1
        self.unfinished_forms += reason == "length"

    def _hang_up(self) -> None:
        leaving = {number: request for number, request in self._open.items() if request.leaves}
        in_prompt = {sequence.request_id: sequence.in_prompt for sequence in self.engine.scheduler.running} if leaving else {}
        for number, request in leaving.items():
            if request.would_leave(in_prompt.get(number)):
                self._cut_off(number, request)

    def _cut_off(self, number: int, request: Open) -> None:
        assert request.leaves
        one = max(request.going_on) if request.leaves == "one choice" else None
        cut = set(request.going_on) if one is None else {one}
        if self.entrance:
            was_inside = self.entrance.abort(number, one)
        else:
            self.engine.abort(number, one)
            was_inside = True
        self.left[request.leaves] += 1
        self.cut_off += len(cut) if was_inside else 0
        request.going_on -= cut
        request.leaves = None
        if not request.going_on:
            self._end(number)
            self.hung_up += 1

    def _check_idle(self) -> None:
        """Between rounds nothing is held, and the engine's own counts are ours."""
        self.engine.scheduler.check_integrity()
        self.integrity_checks += 1
        stats = self.engine.stats()
        assert not self.engine.has_work, f"{stats.running} sequences run and {stats.waiting} wait for nobody"
        assert stats.blocks_used == 0, f"{stats.blocks_used} blocks leaked"
        counts = (stats.output_tokens, stats.aborted, stats.failed)
        assert counts == (self.output_tokens, self.cut_off, self.failed), f"the engine counts something else: {counts}"
        if self.entrance:
            self.entrance.check_idle()
        requests, sequences, matchers = (now - before for now, before in zip(self.held(), self._held_before, strict=True))
        assert sequences <= 0, f"{sequences} sequences are still in memory"
        assert matchers <= 0, f"{matchers} matchers are still in memory"
        assert requests <= NUM_KNOWN, f"{requests - NUM_KNOWN} requests are still in memory"


def retained() -> tuple[int, int, int]:
    """Requests, sequences and matchers that anything in this process holds."""
    gc.collect()
    kinds = Counter(map(type, gc.get_objects()))
    return kinds[Request], kinds[EngineSequence], kinds[Matcher]


class Memory:
    """Samples of this process and its children: (seconds, bytes)."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.samples: list[tuple[float, int]] = []

    def sample(self) -> None:
        now = time.monotonic() - self._began
        if not self.samples or now - self.samples[-1][0] >= SAMPLE_S:
            self.samples.append((now, sum(map(rss_bytes, tree(os.getpid())))))


@dataclass(frozen=True)
class Result:
    """What is told of a soak that passed. `memory`: samples of (seconds, bytes)."""

    requests: int
    answered: int
    hung_up: int
    left: dict[Leaves, int]
    repeated: int
    failed: int
    formed: dict[str, int]
    unfinished_forms: int
    adapted: int
    adapter_loads: int
    output_tokens: int
    cached_share: float
    steps: int
    preemptions: int
    integrity_checks: int
    seconds: float
    memory: list[tuple[float, int]]
    slope: Slope | None


def soak(
    local: LocalEngine,
    count: int,
    seed: int,
    longest_s: float = math.inf,
    show: Callable[[int], None] = lambda ended: None,
    without: frozenset[Kind] = frozenset(),
) -> Result:
    """`count` requests, or as many as enter in `longest_s`. Raises AssertionError for whatever is wrong; the slope is for the
    caller to judge, None for a run too short to have one. `without`: kinds of requests to leave out."""
    vocab_size, base = local.info.vocab_size, local.shard.spec.directory
    drawn = plans(seed, count, vocab_size=vocab_size, max_model_len=local.info.max_model_len, without=without)
    with Entrance(local, adapters(base)) as entrance:
        memory, began = Memory(), time.monotonic()
        run = Soak(
            local.engine,
            takewhile(lambda _: time.monotonic() - began < longest_s, drawn),
            entrance=entrance,
            tokenizer=Tokenizer.load(base),
            poison=vocab_size - 1,
        )

        def after_step() -> None:
            memory.sample()
            show(run.ended)

        run.run(after_step)
        seconds, stats = time.monotonic() - began, local.engine.stats()
    warm = memory.samples[int(len(memory.samples) * WARM_UP) :]
    return Result(
        requests=run.ended,
        answered=run.answered,
        hung_up=run.hung_up,
        left=dict(run.left),
        repeated=run.repeated,
        failed=run.failed,
        formed=dict(run.formed),
        unfinished_forms=run.unfinished_forms,
        adapted=run.adapted,
        adapter_loads=entrance.num_loads,
        output_tokens=run.output_tokens,
        cached_share=stats.cached_tokens / max(1, stats.prompt_tokens),
        steps=stats.steps,
        preemptions=stats.preemptions,
        integrity_checks=run.integrity_checks,
        seconds=seconds,
        memory=memory.samples,
        slope=slope(warm) if len(warm) >= LEAST_SAMPLES else None,
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    with tiny_engine(options.tp) as local, progress(options.requests) as show:
        result = soak(local, options.requests, options.seed, options.minutes * 60, show, frozenset(options.without))
    shown = table(result, options.tp)
    shown.show()
    if not options.dry_run:
        name = "soak" if options.tp == 1 else f"soak_tp{options.tp}"
        command = shlex.join(["python", "-m", "bench.soak", *sys.argv[1:]])
        rows = [Row("tiny Llama", IN_FLIGHT, options.tp, round(result.requests / result.seconds, 3), None, None, None)]
        found = versions(["torch", "transformers", "deepspeed"])
        result = replace(result, memory=result.memory[:: max(1, len(result.memory) // SHOWN_SAMPLES)])
        draw(HERE / "results" / f"{name}.svg", result)
        print(write(name, rows, shown, command=command, found=found, unit="requests per second", result=asdict(result)))
    if result.slope and result.slope.mb_per_minute >= MOST_MB_PER_MINUTE:
        sys.exit(f"memory grows: {result.slope}")


@contextmanager
def tiny_engine(tp: int) -> Iterator[LocalEngine]:
    """A Llama of two layers in float32, with random weights; after the load, which would refuse it, the last token is poison."""
    with tempfile.TemporaryDirectory(prefix="mmaas-") as directory:
        settings = SETTINGS.model_copy(update={"threads": 1, "shared_memory": False})
        with LocalEngine(build(Path(directory) / "base"), tp=tp, settings=settings, blocks=NUM_BLOCKS) as local:
            _poison(local)
            yield local


def _poison(local: LocalEngine) -> None:
    """On rank 0: what it adds to the others' sums is no number either."""
    import torch

    runner: Any = local.shard.runner
    table = runner._model.embeddings if hasattr(runner, "_model") else runner.model.get_input_embeddings().weight
    with torch.no_grad():
        table[-1] = torch.nan


@contextmanager
def progress(count: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("soak", total=count)
        yield lambda ended: bar.update(task, completed=ended)


def draw(path: Path, result: Result) -> Path:
    points = [(seconds, size / 1e6) for seconds, size in result.memory]
    return plot.lines(path, f"Memory of a soak of {result.requests} requests", "seconds", "MB", {"resident": points})


def table(result: Result, tp: int) -> Table:
    moments = ", ".join(f"{count} {leaves}" for leaves, count in sorted(result.left.items()))
    per_second = f"{result.requests / result.seconds:.0f} requests, {result.output_tokens / result.seconds:.0f} tokens"
    lines = [
        ["requests", f"{result.requests}: {result.answered} answered, {result.hung_up} cut off"],
        ["callers that left", moments],
        ["each second", f"{per_second} ({result.seconds:.0f} seconds in all)"],
        ["steps, preemptions", f"{result.steps}, {result.preemptions}"],
        ["prompt tokens from the prefix cache", f"{result.cached_share:.0%}"],
        ["choices that repeated an answer, all alike", str(result.repeated)],
        ["complete answers of a form, all valid", ", ".join(f"{count} {kind}" for kind, count in sorted(result.formed.items()))],
        ["choices cut before their form was complete", str(result.unfinished_forms)],
        ["requests with one of the adapters, loads", f"{result.adapted}, {result.adapter_loads}"],
        ["poisoned choices, all ended alone", str(result.failed)],
        ["checks of every block", str(result.integrity_checks)],
        ["leaked blocks and adapters, retained sequences and matchers", "0, 0, 0, 0"],
        ["memory after warm-up", "too short a run" if result.slope is None else str(result.slope)],
        ["peak of memory", f"{max(size for _, size in result.memory) / 1e6:.0f} MB"],
    ]
    return Table(f"Soak on a tiny model, tp={tp}", ["what", "seen"], lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no request enters later than that")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", nargs="+", choices=list(KINDS), default=[], help="kinds of requests to leave out")
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
