"""What is told of a soak that passed: as a table, and its memory as a plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench import plot
from bench.harness import Table
from bench.slope import Slope
from bench.soak_requests import Leaves


@dataclass(frozen=True)
class Result:
    """`memory`: samples of (seconds, bytes)."""

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
