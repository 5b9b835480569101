"""The scanner against Python's own JSON reader, however the text is cut."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deployments.tools.json_scanner import MAX_DEPTH, JsonScanner

numbers = st.one_of(st.integers(-(10**20), 10**20), st.floats(allow_nan=False, allow_infinity=False))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)),
    max_leaves=12,
)
texts = st.builds(json.dumps, values, ensure_ascii=st.booleans(), indent=st.sampled_from([None, 0, 2]))


def scan(pieces: Iterable[str]) -> tuple[str, bool, bool]:
    """What was read, and how it ended."""
    scanner, read = JsonScanner(), ""
    for piece in pieces:
        read += piece[: scanner.feed(piece)]
        if scanner.done or scanner.broken:
            break
    return read, scanner.done, scanner.broken


def read(text: str) -> object:
    def refuse(_: str) -> object:
        raise ValueError

    return json.loads(text, parse_constant=refuse)


@settings(max_examples=60)
@given(text=texts, behind=st.text(max_size=5))
def test_a_value_ends_where_it_ends(text, behind):
    if text[0] in '{["' or text in ("true", "false", "null"):
        assert scan([text + behind]) == (text, True, False)
        assert scan(text + behind) == (text, True, False)
    else:  # a number ends at what can't belong to it
        assert scan([text, " " + behind]) == scan(text + " " + behind) == (text, True, False)


@settings(max_examples=150)
@given(data=st.data(), text=texts)
@example(data=None, text="[1,]")
@example(data=None, text='{"a":1,}')
@example(data=None, text="[01]")
@example(data=None, text='["\\x"]')
def test_what_it_takes_json_takes_and_the_other_way_round(data, text):
    if data is not None:  # spoil it
        place = data.draw(st.integers(0, len(text)))
        text = text[:place] + data.draw(st.sampled_from(list('{}[],:"\\ 0-e.tn\n\x01x'))) + text[place:]
    text = f"[{text}]"
    got, done, broken = scan(text)
    try:
        read(text)
        right = True
    except ValueError:
        right = False
    assert (done and got == text) == right
    assert not (done and broken)
    assert scan([text]) == (got, done, broken)


@given(text=texts, data=st.data())
def test_the_beginning_of_a_value_is_never_broken(text, data):
    assert not scan([text[: data.draw(st.integers(0, len(text)))]])[2]


@pytest.mark.parametrize(("depth", "right"), [(MAX_DEPTH, True), (MAX_DEPTH + 1, False)])
def test_depth_is_bounded(depth, right):
    assert scan("[" * depth + "]" * depth)[1] is right


def test_what_stands_for_a_special_token_is_no_part_of_a_string():
    assert scan('["\ud800"]') == ('["', False, True)
