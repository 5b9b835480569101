"""Rows, tables and the files they are written to."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.harness import Plot, Row, Spread, Table, compare, machine, percentile, replace_block, versions, write

README = "# Title\n\n<!-- engine: start -->\nold\n<!-- engine: end -->\n\nafter\n"
TABLE = Table("Speed", ["model", "tokens/s"], [["S", "100"], ["M", "10"]])


def test_the_best_peer_is_the_fastest():
    row = compare(50.0, {"a": 100.0, "b": 25.0}, model="S", concurrency=8, tp=2)
    assert row == Row("S", 8, 2, 50.0, 100.0, "a", 0.5)


def test_where_less_is_better_the_best_peer_is_the_lowest():
    row = compare(50.0, {"a": 100.0, "b": 25.0}, model="S", concurrency=1, tp=1, higher_is_better=False)
    assert (row.peer, row.ratio) == ("b", 0.5)


def test_without_peers_there_is_no_row():
    assert compare(1.0, {}, model="S", concurrency=1, tp=1) is None


@given(before=st.text(), after=st.text(), block=st.text())
def test_replacing_a_block_keeps_the_rest(before, after, block):
    text = f"{before}<!-- x: start -->\nold\n<!-- x: end -->{after}"
    if "<!--" not in before + block:
        assert replace_block(text, "x", block) == f"{before}<!-- x: start -->\n{block}\n<!-- x: end -->{after}"


def test_replacing_twice_is_replacing_once():
    once = replace_block(README, "engine", "new")
    assert replace_block(once, "engine", "new") == once
    assert "old" not in once


@pytest.mark.parametrize(
    "text", ["", "<!-- engine: start -->", "<!-- engine: end -->", "<!-- engine: end --><!-- engine: start -->"]
)
def test_a_page_without_markers_is_an_error(text):
    with pytest.raises(ValueError, match="engine: start"):
        replace_block(text, "engine", "new")


def test_results_go_to_a_file_and_a_table(tmp_path):
    (tmp_path / "README.md").write_text(README)
    row = Row("S", 1, 1, 2.0, 1.0, "other", 2.0)
    path = write("engine", [row], TABLE, command="python -m bench.engine", found={"torch": "2"}, here=tmp_path, left_out={})
    content = json.loads(path.read_text())
    assert path == tmp_path / "results" / "engine.json"
    assert content["rows"] == [
        {"model": "S", "concurrency": 1, "tp": 1, "ours": 2.0, "best_peer": 1.0, "peer": "other", "ratio": 2.0}
    ]
    assert content["versions"] == {"torch": "2"}
    assert content["machine"]["cores"] >= 1
    page = (tmp_path / "README.md").read_text()
    assert "| S | 100 |" in page
    assert "`python -m bench.engine`" in page
    assert content["date"] in page
    assert page.startswith("# Title")
    assert page.endswith("after\n")


def test_plots_go_beside_the_results_and_onto_the_page(tmp_path):
    (tmp_path / "README.md").write_text(README)
    plot = Plot("speed", "Speed over time", "s", "tokens/s", {"S": [(0.0, 1.0), (1.0, 2.0)]})
    write("engine", [], TABLE, TABLE, command="c", found={}, plots=[plot], here=tmp_path)
    assert (tmp_path / "results" / "engine-speed.svg").read_text().startswith("<svg")
    page = (tmp_path / "README.md").read_text()
    assert "![Speed over time](results/engine-speed.svg)" in page
    assert page.count("| S | 100 |") == 2


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_a_percentile_is_numpys(values):
    assert percentile(values, 95) == pytest.approx(np.percentile(values, 95))


def test_a_spread_is_of_all_values():
    assert Spread.of([float(n) for n in range(101)]) == Spread(50.0, 95.0, 99.0, 100.0)


def test_a_table_is_markdown_of_equal_columns():
    lines = TABLE.markdown().splitlines()
    assert lines[1] == "| --- | --- |"
    assert {line.count("|") for line in lines} == {3}


def test_the_machine_is_described():
    about = machine()
    assert about["cpu"]
    assert about["memory_gib"] > 0


def test_versions_name_only_what_is_installed():
    assert versions(["pytest", "no-such-package-anywhere"]).keys() == {"pytest"}
