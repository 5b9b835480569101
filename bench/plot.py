"""Line plots as SVG, written by hand: the same figures give the same bytes, so that a plot can be committed and compared.

It knows nothing of benchmarks. A plot is a title, two axes and named series; it has a white ground of its own, for dark pages too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 44, 56  # margins in pixels; the legend stands in the right one
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito: told apart by all eyes
MAX_MARKED = 40  # a series of more points is a line without marks


@dataclass(frozen=True)
class Axis:
    """From values to pixels between `start` and `end`; `log` counts in doublings."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], label: str, start: float, end: float, *, log: bool, from_zero: bool) -> Axis:
        """As wide as the values, rounded to whole ticks. Raises ValueError for a value that has no place on it."""
        if not values or not all(math.isfinite(value) and (value > 0 or not log) for value in values):
            raise ValueError(f"{label}: a plot needs finite values, and a logarithmic axis positive ones")
        low, high = min(values), max(values)
        ticks = doublings(low, high) if log else steps(min(low, 0.0) if from_zero else low, high)
        low, high = (min(low, ticks[0]), max(high, ticks[-1])) if log else (ticks[0], ticks[-1])
        return cls(label, low, high, ticks, start, end, log)

    def place(self, value: float) -> float:
        low, high, at = (math.log2(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (self.end - self.start) * ((at - low) / (high - low) if high > low else 0.5)


def steps(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers at equal distances from at most `low` to at least `high`."""
    largest = max(abs(low), abs(high))
    span = high - low if high - low > 1e-9 * largest + 1e-12 else largest + 1e-9  # what differs in the last bits is the same
    power = 10 ** math.floor(math.log10(span / about))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= about)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def doublings(low: float, high: float) -> list[float]:
    """The powers of two between the two, or both of them where there is none."""
    found = [2.0**power for power in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    return found[:: math.ceil(len(found) / 12)] if found else [low, high]


def lines(
    path: Path,
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[Point]],
    *,
    log_x: bool = False,
    log_y: bool = False,
    dashed: Collection[str] = (),
) -> Path:
    """Writes one line per series, in the order of its points; those in `dashed` are bounds or objectives rather than measurements.

    Raises ValueError if there is no point at all, or one that isn't finite (on a logarithmic axis: positive).
    """
    shown = {name: list(points) for name, points in series.items() if points}
    xs, ys = ([point[axis] for points in shown.values() for point in points] for axis in (0, 1))
    x = Axis.over(xs, x_label, LEFT, WIDTH - RIGHT, log=log_x, from_zero=False)
    y = Axis.over(ys, y_label, HEIGHT - BOTTOM, TOP, log=log_y, from_zero=True)
    parts = [*_frame(title, x, y)]
    for number, (name, points) in enumerate(shown.items()):
        parts += _series(number, name, [(x.place(a), y.place(b)) for a, b in points], name in dashed)
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12" fill="#222222">'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, *parts, "</svg>"]) + "\n", encoding="utf-8")
    return path


def _frame(title: str, x: Axis, y: Axis) -> list[str]:
    """Ground, title, grid, tick labels and the names of the axes."""
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>', _text(LEFT, 26, title, "start", ' font-size="15"')]
    for tick in x.ticks:
        parts += [
            _line(x.place(tick), TOP, x.place(tick), HEIGHT - BOTTOM),
            _text(x.place(tick), HEIGHT - BOTTOM + 17, f"{tick:g}"),
        ]
    for tick in y.ticks:
        parts += [_line(LEFT, y.place(tick), WIDTH - RIGHT, y.place(tick)), _text(LEFT - 7, y.place(tick) + 4, f"{tick:g}", "end")]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f' transform="rotate(-90 18 {_number(middle)})"'
    return [*parts, _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, x.label), _text(18, middle, y.label, "middle", turned)]


def _series(number: int, name: str, points: Sequence[Point], is_dashed: bool) -> list[str]:
    """A line, its marks and its entry in the legend."""
    colour, stroke = COLOURS[number % len(COLOURS)], ' stroke-dasharray="6 4"' if is_dashed else ""
    legend_x, legend_y = WIDTH - RIGHT + 14, TOP + 10 + 20 * number
    style = f'fill="none" stroke="{colour}" stroke-width="2"{stroke}'
    parts = [
        f'<polyline points="{" ".join(f"{_number(a)},{_number(b)}" for a, b in points)}" {style}/>',
        f'<polyline points="{legend_x},{legend_y} {legend_x + 24},{legend_y}" {style}/>',
        _text(legend_x + 30, legend_y + 4, name, "start"),
    ]
    if is_dashed or len(points) > MAX_MARKED:
        return parts
    marked = [*points, (legend_x + 12.0, float(legend_y))]
    return parts + [f'<circle cx="{_number(a)}" cy="{_number(b)}" r="3.5" fill="{colour}"/>' for a, b in marked]


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    ends = " ".join(f'{name}="{_number(value)}"' for name, value in (("x1", x1), ("y1", y1), ("x2", x2), ("y2", y2)))
    return f'<line {ends} stroke="#dddddd"/>'


def _text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{_number(x)}" y="{_number(y)}" text-anchor="{anchor}"{more}>{escape(words)}</text>'


def _number(value: float) -> str:
    """A tenth of a pixel is enough, and keeps the file the same where arithmetic differs in the last bit."""
    return f"{value:.1f}".removesuffix(".0")
