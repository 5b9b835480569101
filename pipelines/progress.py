"""What a person sees of a training run: a bar with the loss falling on a terminal, plain log events everywhere else."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from training.journal import Failure, Happening
from training.journal import Progress as Report

logger = logging.getLogger(__name__)

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 24
_WIDE = 120  # columns from which everything fits on one line


class Display(Protocol):
    """Shows one run. `tell` is called from a thread of the trainer, the others from the driver's main thread."""

    def stage(self, text: str) -> None:
        """A new stage begins; the one before is done."""

    def tell(self, happening: Happening) -> None:
        """The stage that trains has news."""

    def finish(self, summary: str, question: str, answer: str) -> None:
        """All is done; a sample shows what was learnt."""

    def close(self) -> None:
        """Give the terminal back, whether the run ended well or not."""


def display(console: Console | None) -> Display:
    return TerminalDisplay(console) if console is not None and console.is_terminal else LogDisplay()


class TerminalDisplay:
    """One line for each stage, and below them the bar of the training."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._losses: list[float] = []
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24 if console.width >= _WIDE else 8),
            TextColumn("[cyan]{task.fields[news]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._note = Text("")
        self._live = Live(Group(self._progress, self._note), console=console, refresh_per_second=8)
        self._live.start()
        self._task: TaskID | None = None

    def stage(self, text: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, total=1, completed=1)
        self._task = self._progress.add_task(text, total=None, news="")

    def tell(self, happening: Happening) -> None:
        if self._task is None:
            return
        if isinstance(happening, Failure):
            self._note.plain = f"a worker was lost ({'; '.join(happening.errors.values())[:90]}): going on from the last checkpoint"
            return
        self._note.plain = ""
        self._losses.append(happening.loss)
        self._progress.update(
            self._task, total=happening.steps, completed=happening.step, news=_news(happening, self._losses, self._console.width)
        )

    def finish(self, summary: str, question: str, answer: str) -> None:
        self.stage("")
        self._progress.remove_task(self._progress.task_ids[-1])
        self._task = None
        self.close()
        sample = Group(Text(question, style="bold"), Text(answer, style="green"))
        self._console.print(Panel(sample, title="It has learnt to answer", subtitle=summary, expand=False))

    def close(self) -> None:
        self._live.stop()


class LogDisplay:
    """The same as log events."""

    def stage(self, text: str) -> None:
        logger.info(text)

    def tell(self, happening: Happening) -> None:
        if isinstance(happening, Failure):
            logger.warning("a worker was lost, going on from the last checkpoint: %s", happening.errors)
            return
        logger.info(
            "step %d of %d: loss %.3f, %.0f tokens/s, %.0f s left",
            happening.step,
            happening.steps,
            happening.loss,
            happening.tokens_per_s,
            remaining_s(happening),
        )

    def finish(self, summary: str, question: str, answer: str) -> None:
        logger.info("%s; asked %r it answers %r", summary, question, answer)

    def close(self) -> None:
        """There is nothing to give back."""


def remaining_s(report: Report) -> float:
    """Seconds until the last step at the present speed."""
    tokens_per_step = report.tokens / report.step
    return (report.steps - report.step) * tokens_per_step / max(report.tokens_per_s, 1e-9)


def sparkline(values: Sequence[float], width: int = _SPARK_WIDTH) -> str:
    """The values from the first to the last in at most `width` blocks, the lowest as the lowest block."""
    if not values:
        return ""
    size = min(width, len(values))
    groups = [values[index * len(values) // size : (index + 1) * len(values) // size] for index in range(size)]
    means = [sum(group) / len(group) for group in groups]
    low, span = min(means), max(means) - min(means)
    return "".join(_BLOCKS[round((mean - low) / span * (len(_BLOCKS) - 1)) if span else 0] for mean in means)


def _news(report: Report, losses: Sequence[float], width: int) -> str:
    left = round(remaining_s(report))
    done = f"{report.step}/{report.steps}"
    time_left = f"{left // 60}:{left % 60:02d} left"
    if width < _WIDE:
        return f"{done} {sparkline(losses, 8)} {report.loss:.2f} · {time_left}"
    return f"{done} {sparkline(losses)} loss {report.loss:.2f} · {report.tokens_per_s:,.0f} tokens/s · {time_left}"
