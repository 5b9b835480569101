"""The parts of a decode step, and to which of them an operator or a counter belongs. `bench.step_profile` measures them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LINEAR, ATTENTION, REST, REDUCE, PYTHON = "linear", "attention", "norms, rotary, rest", "reduce", "Python in the model"
SAMPLING, SCHEDULING, BROADCAST = "sampling", "scheduling, delivery", "broadcast"
PARTS = (LINEAR, ATTENTION, REST, PYTHON, SAMPLING, SCHEDULING, BROADCAST, REDUCE)
"""In the order of the table. `reduce` is the sum over ranks, in which a rank also waits for the slowest."""

OPERATORS = {
    "attention": ATTENTION,
    **dict.fromkeys(("aten::linear", "aten::matmul", "aten::addmm", "aten::mm", "aten::bmm"), LINEAR),
    **dict.fromkeys(("RowParallel", "ColumnParallel", "c10d::allreduce_"), REDUCE),
}
"""Events of torch's profiler, each with all that it calls; whatever none of them calls is the rest."""
COUNTERS = {
    REDUCE: ("reduce",),
    ATTENTION: ("attention", "attn"),
    LINEAR: ("linear", "qkv", "proj", "gate", "up", "down", "mlp", "head", "matmul", "gemm", "logits"),
}
"""Words in the names of a runner's own counters; the first part that has one gets it."""


@dataclass(frozen=True)
class Event:
    """What is read of a profiler's event: the names of itself and its callers, outermost first, and its own time."""

    path: Sequence[str]
    own_s: float


def sort_events(events: Iterable[Event]) -> dict[str, float]:
    """Seconds of the operators below `model` by part. What `model` itself takes is no operator's."""
    seconds = dict.fromkeys((LINEAR, ATTENTION, REST, REDUCE), 0.0)
    for event in events:
        inner = event.path[event.path.index("model") + 1 :] if "model" in event.path else ()
        if inner:
            seconds[next((OPERATORS[name] for name in inner if name in OPERATORS), REST)] += event.own_s
    return seconds


def sort_counters(counters: Mapping[str, float]) -> dict[str, float]:
    """A runner's own counters by part."""
    seconds = dict.fromkeys((LINEAR, ATTENTION, REST, REDUCE), 0.0)
    for name, counted in counters.items():
        words = name.lower().replace("-", "_").replace(" ", "_").split("_")
        part = next((part for part, known in COUNTERS.items() if set(words) & set(known)), REST)
        seconds[part] += counted
    return seconds


def divide(
    model_s: float, inside: Mapping[str, float], outside_s: float, sampling_s: float, broadcast_s: float
) -> dict[str, float]:
    """All parts of a step: those inside the model, what they leave of its time, and those around it. Where the watched ones took
    longer than the whole model does unwatched, they share its time in their proportions."""
    watched_s = sum(inside.values())
    scale = min(1.0, model_s / watched_s) if watched_s else 1.0
    return {part: seconds * scale for part, seconds in inside.items()} | {
        PYTHON: max(0.0, model_s - watched_s),
        SAMPLING: sampling_s,
        SCHEDULING: max(0.0, outside_s - sampling_s),
        BROADCAST: broadcast_s,
    }
