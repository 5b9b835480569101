"""Small real implementations of our own interfaces, for tests. A fake works; what it does can be set from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console

from cluster.settings import Settings
from mmaas.up import Platform


@dataclass
class FakePlatform(Platform):
    """A platform without processes: remembers the steps that were taken, and runs once it was started and applied to."""

    steps: list[str] = field(default_factory=list)
    is_started: bool = False
    champion: bool = False
    applied: int = 0

    def start(self, settings: Settings, on_event: Callable[[str], None]) -> list[str]:
        if self.is_started:
            return []
        self.is_started = True
        self.steps.append("start")
        on_event("starting Ray")
        return ["ray", "mlflow"]

    def has_champion(self, settings: Settings) -> bool:
        return self.champion

    def train(self, settings: Settings, console: Console) -> None:
        self.steps.append("train")
        self.champion = True

    def is_serving(self, settings: Settings, names: list[str]) -> bool:
        return self.applied > 0

    def apply(self, settings: Settings, on_event: Callable[[str], None]) -> None:
        self.steps.append("apply")
        self.applied += 1
