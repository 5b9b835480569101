"""Plots: well-formed, the same every time, every point inside the frame."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.plot import BOTTOM, HEIGHT, LEFT, MAX_MARKED, RIGHT, TOP, WIDTH, doublings, lines, steps

SVG = "{http://www.w3.org/2000/svg}"
SERIES = {"ours <1>": [(1.0, 80.0), (8.0, 450.0), (32.0, 550.0)], "others & all": [(1.0, 70.0), (32.0, 500.0)], "none": []}
finite = st.floats(-1e9, 1e9)


def drawn(path: Path) -> ElementTree.Element:
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


def test_a_plot_is_xml_with_its_words_and_a_line_for_each_series(tmp_path: Path) -> None:
    root = drawn(lines(tmp_path / "new" / "a.svg", "Speed < light", "requests", "tokens/s", SERIES, log_x=True))
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert {"Speed < light", "requests", "tokens/s", "ours <1>", "others & all", "32"} <= set(words)
    assert "none" not in words
    assert len(list(root.iter(f"{SVG}polyline"))) == 2 * 2
    assert len(list(root.iter(f"{SVG}circle"))) == 3 + 2 + 2


def test_the_same_figures_give_the_same_bytes(tmp_path: Path) -> None:
    plots = [lines(tmp_path / name, "t", "x", "y", SERIES).read_bytes() for name in ("a.svg", "b.svg")]
    assert plots[0] == plots[1]


def test_a_bound_is_dashed_and_a_long_series_has_no_marks(tmp_path: Path) -> None:
    series = {"bound": [(0.0, 1.0), (1.0, 1.0)], "many": [(n / 10, 2.0) for n in range(MAX_MARKED + 1)]}
    root = drawn(lines(tmp_path / "a.svg", "t", "x", "y", series, dashed=["bound"]))
    assert sum("stroke-dasharray" in line.attrib for line in root.iter(f"{SVG}polyline")) == 2
    assert not list(root.iter(f"{SVG}circle"))


@given(points=st.lists(st.tuples(finite, finite), min_size=1, max_size=20))
def test_every_point_lies_inside_the_frame(points: list[tuple[float, float]], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = drawn(lines(tmp_path_factory.mktemp("plots") / "a.svg", "t", "x", "y", {"a": points}))
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter(f"{SVG}circle")][:-1]
    assert len(circles) == len(points)
    assert all(LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1 and TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1 for x, y in circles)


@pytest.mark.parametrize(
    ("points", "log"), [([], False), ([(1.0, math.nan)], False), ([(math.inf, 1.0)], False), ([(0.0, 1.0)], True)]
)
def test_what_has_no_place_is_refused(points: list[tuple[float, float]], log: bool, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finite values"):
        lines(tmp_path / "a.svg", "t", "x", "y", {"a": points}, log_x=log)
    assert not (tmp_path / "a.svg").exists()


@given(low=finite, span=st.floats(0, 1e9))
def test_ticks_enclose_the_values_at_equal_distances(low: float, span: float) -> None:
    ticks = steps(low, low + span)
    slack = 1e-6 * (abs(low) + span + 1)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack
    assert 2 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))


def test_ticks_are_round_numbers() -> None:
    assert steps(0, 437) == [0, 100, 200, 300, 400, 500]
    assert steps(0.2, 1.1) == [0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    assert doublings(1, 32) == [1, 2, 4, 8, 16, 32]
    assert doublings(5, 7) == [5, 7]
