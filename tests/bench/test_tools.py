"""The benchmark of tool calls: what is read, and what it makes of the times."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.harness import Row
from bench.tools import FORMATS, TOOLS, Reading, Serving, read_all, reading_table, rows, serving_table, written
from cluster.types import ToolChoice
from deployments.engine.tokenizer import Tokenizer
from tests.deployments.engine import texts

READINGS = [Reading("none", "text", 10, 4.0), Reading("hermes", "text", 10, 5.0), Reading("none", "calls", 10, 4.0)]


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "none"])
def test_calls_are_calls_and_prose_is_none(name: str) -> None:
    for text in ("text", "calls"):
        stream = FORMATS[name].stream(TOOLS, ToolChoice())
        found = [stream.push(written(name, text)), stream.finish(cut=False)]
        assert stream.has_calls == (text == "calls")
        assert bool("".join(news.text for news in found).strip("; ")) == (text == "text")


def test_every_format_reads_both_kinds(tmp_path: Path) -> None:
    found = read_all(Tokenizer.load(texts.byte_level(tmp_path)), num_tokens=50, rounds=1)
    assert {(reading.format, reading.text) for reading in found} == {(name, text) for name in FORMATS for text in ("text", "calls")}
    assert min(reading.us for reading in found) > 0


def test_the_peer_is_the_same_without_tools() -> None:
    found = rows(READINGS, [Serving(32, plain=1000.0, with_tools=900.0)])
    assert found == [
        Row("hermes, text: us a token", 1, 1, 5.0, 4.0, "no tools", 0.8),
        Row("S: tokens/s", 32, 1, 900, 1000, "no tools", 0.9),
    ]
    assert reading_table(READINGS).lines[1] == ["hermes", "text", "5.0", "1.0"]
    assert serving_table([Serving(32, 1000.0, 900.0)]).lines == [["32", "1000", "900", "0.90"]]
