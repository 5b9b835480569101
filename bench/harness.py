"""What every benchmark shares: which machine and versions, the form of its results, and its tables and plots in README.md.

A result file is `{"machine", "versions", "command", "date", "rows": [{"ours", "best_peer", "peer", "ratio", ...}]}`; `ratio` is
ours over the best peer's where more is better and the inverse where less is, so that higher is always better. Where there is
nobody to compare with, all three are null.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from bench.plot import Point, lines

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Row:
    """One claim: ours beside the best of the others at the same work, if there are others."""

    model: str
    concurrency: int
    tp: int
    ours: float
    best_peer: float | None
    peer: str | None
    ratio: float | None


@dataclass(frozen=True)
class Table:
    """A title, the names of the columns and the cells."""

    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]

    def markdown(self) -> str:
        rows = [self.columns, ["---"] * len(self.columns), *self.lines]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)

    def show(self) -> None:
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(*self.columns, title=self.title)
        for cells in self.lines:
            table.add_row(*cells)
        Console().print(table)


@dataclass(frozen=True)
class Plot:
    """A plot of a benchmark, whose `name` tells its file from those of its other plots; the rest is as in `bench.plot.lines`."""

    name: str
    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    log_x: bool = False
    log_y: bool = False
    dashed: Collection[str] = ()

    def draw(self, path: Path) -> Path:
        axes = {"log_x": self.log_x, "log_y": self.log_y}
        return lines(path, self.title, self.x_label, self.y_label, self.series, **axes, dashed=self.dashed)


@dataclass(frozen=True)
class Spread:
    """Percentiles of many values, and the largest of them."""

    p50: float
    p95: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(*(percentile(values, percent) for percent in (50, 95, 99)), max(values))


def percentile(values: Sequence[float], percent: int) -> float:
    """Between the two nearest values, as numpy does it."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def machine() -> dict[str, Any]:
    """What a reader needs to judge a figure."""
    cpu = _first_value("/proc/cpuinfo", "model name") or platform.processor()
    flags = (_first_value("/proc/cpuinfo", "flags") or "").split()
    memory_kib = (_first_value("/proc/meminfo", "MemTotal") or "0").split()[0]
    telling = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "flags": [flag for flag in telling if flag in flags],
        "memory_gib": round(int(memory_kib) / (1 << 20), 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _first_value(path: str, key: str) -> str | None:
    """The value of the first `key: value` line of a file in /proc."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == key), None)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those packages that are installed here."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def compare(
    ours: float, peers: Mapping[str, float], *, model: str, concurrency: int, tp: int, higher_is_better: bool = True
) -> Row | None:
    """The row that states ours against the best peer; None if no peer ran."""
    if not peers:
        return None
    peer = (max if higher_is_better else min)(peers, key=lambda name: peers[name])
    ratio = ours / peers[peer] if higher_is_better else peers[peer] / ours
    return Row(model, concurrency, tp, round(ours, 3), round(peers[peer], 3), peer, round(ratio, 3))


def write(
    name: str,
    rows: Sequence[Row],
    *tables: Table,
    command: str,
    found: Mapping[str, str],
    plots: Sequence[Plot] = (),
    here: Path = HERE,
    **more: Any,
) -> Path:
    """Writes `results/NAME.json` and `results/NAME-PLOT.svg`, and replaces the tables and plots of that name in README.md."""
    about, date = machine(), datetime.now(UTC).date().isoformat()
    content = {
        "machine": about,
        "versions": dict(found),
        "command": command,
        "date": date,
        "rows": [asdict(row) for row in rows],
        **more,
    }
    path = here / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    drawn = {plot.title: plot.draw(path.with_name(f"{name}-{plot.name}.svg")) for plot in plots}
    unfinished = path.with_suffix(".tmp")  # a run that is cut leaves a whole file behind
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)
    pictures = [f"![{title}](results/{file.name})" for title, file in drawn.items()]
    shown = [f"{table.title}\n\n{table.markdown()}" for table in tables]
    block = "\n\n".join([*shown, *pictures, _origin(command, date, about, found)])
    readme = here / "README.md"
    readme.write_text(replace_block(readme.read_text(), name, block))
    return path


def earlier(name: str, here: Path = HERE) -> dict[str, Any]:
    """What `results/NAME.json` holds, for a run that was cut into pieces; nothing if there is none."""
    path = here / "results" / f"{name}.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


def _origin(command: str, date: str, about: Mapping[str, Any], found: Mapping[str, str]) -> str:
    tools = ", ".join(f"{package} {number}" for package, number in sorted(found.items()))
    cpu = f"{about['cores']} cores of {about['cpu']} ({' '.join(about['flags'])})"
    where = f"{cpu}, {about['memory_gib']} GiB, Python {about['python']}"
    return f"`{command}`, {date}, {where}; {tools}."


def replace_block(text: str, name: str, block: str) -> str:
    """`text` with what stands between the markers of `name` replaced. Raises ValueError if it has no such markers."""
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    before, found_start, rest = text.partition(start)
    _, found_end, after = rest.partition(end)
    if not (found_start and found_end):
        raise ValueError(f"README.md has no lines {start} and {end}")
    return f"{before}{start}\n{block}\n{end}{after}"
