"""Requests as they came to a real service: when, how long their prompts, how long their answers. It sends nothing."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from bench.prompts import random_tokens

CONVERSATIONS = Path(__file__).parent / "data" / "azure_llm_2023_conv.csv"


@dataclass(frozen=True)
class Arrival:
    """One request; `at_s` counts from the first one."""

    at_s: float
    prompt_tokens: int
    output_tokens: int

    def prompt(self, numbers: random.Random, vocab_size: int) -> list[int]:
        return random_tokens(numbers, self.prompt_tokens, vocab_size)


def read(path: Path = CONVERSATIONS, *, shorter: int = 1) -> list[Arrival]:
    """The trace, prompts and answers `shorter` times as short (at least one token; an answer two, so that it has time between
    tokens). Raises ValueError for a file of another form, or whose times run backwards."""
    with path.open(newline="") as file:
        next(csv.reader(file))
        rows = [(_seconds(at), int(prompt), int(output)) for at, prompt, output in csv.reader(file)]
    if not rows or any(later[0] < earlier[0] for earlier, later in pairwise(rows)):
        raise ValueError(f"{path.name} is no trace in the order of arrival")
    return [Arrival(at - rows[0][0], max(1, round(p / shorter)), max(2, round(o / shorter))) for at, p, o in rows]


def at_rate(arrivals: Sequence[Arrival], rate: float, seconds: float) -> list[Arrival]:
    """The first `rate * seconds` requests in so many seconds: time runs faster or slower, bunches and pauses stay what they are.

    Raises ValueError if the trace is too short.
    """
    count = max(2, round(rate * seconds))
    if count > len(arrivals):
        raise ValueError(f"{rate:g} requests/s over {seconds:g} s are {count} requests, the trace has {len(arrivals)}")
    some = arrivals[:count]
    scale = (count - 1) / rate / some[-1].at_s
    return [Arrival(arrival.at_s * scale, arrival.prompt_tokens, arrival.output_tokens) for arrival in some]


def _seconds(text: str) -> float:
    """Since 1970; the trace has a digit more than Python reads."""
    whole, _, fraction = text.partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")
