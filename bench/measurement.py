"""What one engine did at one model and concurrency, and a run of such measurements that goes on after it was cut."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from bench.harness import Spread, machine


@dataclass(frozen=True)
class Measurement:
    """One engine at one model and concurrency. Times in seconds, over all requests; gaps over all of their tokens."""

    engine: str
    model: str
    concurrency: int
    tp: int
    ours: bool
    tokens_per_s: float
    first_token_s: Spread
    per_token_s: Spread
    gap_s: Spread
    peak_rss_bytes: int
    load_s: float

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """From what `dataclasses.asdict` made of one."""
        return cls(**{name: Spread(**value) if name in SPREADS else value for name, value in values.items()})


SPREADS = ("first_token_s", "per_token_s", "gap_s")


def gaps(times_s: Sequence[float]) -> list[float]:
    """Between the moments at which tokens came; those that came together are one moment."""
    return [after - before for before, after in pairwise(times_s) if after > before]


@dataclass
class Run:
    """What was asked for and what is there of it. `options` are the command line's, by name, `engines` and `models` among them."""

    options: dict[str, Any]
    command: str
    measurements: list[Measurement] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    bandwidth: dict[str, float] = field(default_factory=dict)
    """Bytes per second that were read from a buffer of each model's size, the most of all times that it was tried."""

    @property
    def missing(self) -> list[tuple[str, str]]:
        """Models and engines that are still to be measured, in order. One that couldn't run is tried again when the run goes on."""
        done = {(m.model, m.engine) for m in self.measurements}
        wanted = [(model, engine) for model in self.options["models"] for engine in self.options["engines"]]
        return [pair for pair in wanted if pair not in done]

    @property
    def is_complete(self) -> bool:
        return all(f"{engine}, {model}" in self.left_out for model, engine in self.missing)

    def note_bandwidth(self, name: str, bytes_per_s: float) -> None:
        self.bandwidth[name] = max(bytes_per_s, self.bandwidth.get(name, 0.0))

    def state(self) -> dict[str, Any]:
        """What `load` needs, as JSON takes it, beside what every result file has."""
        state = {"options": self.options, "complete": self.is_complete, "left_out": self.left_out}
        return state | {"bandwidth_bytes_per_s": self.bandwidth, "measurements": [asdict(m) for m in self.measurements]}

    @classmethod
    def load(cls, path: Path) -> Self:
        """A run that was cut, from its result file. Raises ValueError if it is complete, or another machine's: figures of two runs
        are never mixed."""
        content = json.loads(path.read_text())
        if content.get("complete", True):
            raise ValueError(f"the run in {path.name} is complete; begin another one")
        if content["machine"] != machine():
            raise ValueError(f"the run in {path.name} was begun on another machine")
        measured = [Measurement.parse(values) for values in content["measurements"]]
        bandwidth = content["bandwidth_bytes_per_s"]
        return cls(content["options"], content["command"], measured, content["versions"], bandwidth=bandwidth)
