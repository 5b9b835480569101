"""What happens in a run, one JSON object a line, appended by Ray Train's controller and followed by the driver beside it.

Ray pins the controller to the driver's node, so a file joins them; drawing and posting stay out of the controller, where a slow
call would hold up its watch over the workers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from ray.train import UserCallback

_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Progress:
    """All ranks have come so far. `loss` is the mean over ranks in nats a token, `learning_rate` that of the last step."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    tokens: int
    tokens_per_s: float
    resumed_from: int
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """Workers that were lost or raised, by rank; Ray starts the group again unless it has failed too often."""

    errors: dict[str, str]


Happening = Progress | Failure


class Journal(UserCallback):  # type: ignore[misc]
    """Writes the happenings of one run to a file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        first = metrics[0]
        shared = {key: first[key] for key in ("step", "steps", "learning_rate", "tokens", "tokens_per_s", "resumed_from")}
        loss = sum(report["loss"] for report in metrics) / len(metrics)
        self._append({"progress": {**shared, "loss": loss, "pids": [report["pid"] for report in metrics]}})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        errors = {str(rank): f"{type(error).__name__}: {error}".splitlines()[0] for rank, error in worker_exceptions.items()}
        self._append({"failure": {"errors": errors}})

    def _append(self, record: dict[str, Any]) -> None:
        with Path(self._path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def parse(line: str) -> Happening:
    record = json.loads(line)
    if "failure" in record:
        return Failure(**record["failure"])
    fields = record["progress"]
    return Progress(**{**fields, "pids": tuple(fields["pids"])})


def follow(path: Path, ended: Event, tell: Callable[[Happening], None]) -> None:
    """Tell every happening in order, until `ended` is set and the file is read to its end. Runs in a thread of the driver."""
    for line in _lines(path, ended):
        tell(parse(line))


def _lines(path: Path, ended: Event) -> Iterator[str]:
    path.touch()
    with path.open(encoding="utf-8") as file:
        rest = ""
        while True:
            is_last = ended.is_set()
            *whole, rest = (rest + file.read()).split("\n")
            yield from whole
            if is_last:
                return
            time.sleep(_POLL_S)
