"""Calls of every family out of text that comes in any pieces."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deployments.tools.formats import Family
from deployments.tools.hermes import Hermes
from deployments.tools.llama import Llama
from deployments.tools.marks import Mark
from deployments.tools.mistral import Mistral
from deployments.tools.source import Said
from deployments.tools.stream import CallStream

NAMES = frozenset({"get_weather", "add", "f-1"})
HIDDEN = "\ud800"
FAMILIES: dict[str, Family] = {
    "hermes": Hermes(Mark("<tool_call>"), Mark("</tool_call>")),
    "llama": Llama(Mark("<|python_tag|>")),
    "llama-special": Llama(Mark(HIDDEN, 7)),
    "mistral": Mistral(Mark("[TOOL_CALLS]"), Mark("[ARGS]"), Mark("[CALL_ID]"), "list"),
    "mistral-named": Mistral(Mark(HIDDEN, 5), Mark("\ud801", 6), Mark("\ud802", 7), "named"),
}
SCRAPS = {
    "hermes": ["<tool_call>", "</tool_call>", "<tool", "_call>", "<"],
    "llama": ["<|python_tag|>", "<|py", ";", "|>"],
    "llama-special": [HIDDEN, ";"],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[TOOL", "[CALL_ID]", "]", ", ", "["],
    "mistral-named": [HIDDEN, "\ud801", "\ud802", "add", "[ARGS]"],
}
JSON = [
    '{"name": "add", ',
    '"arguments": {"a": 1}}',
    '"parameters": {"b": "}{"}}',
    "{",
    "}",
    '"',
    "\\",
    " ",
    "\n",
    "1",
    '{"name":"add"}',
]

arguments = st.dictionaries(
    st.text(max_size=6),
    st.recursive(
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.sampled_from(["}", "</tool_call>", '"{', "é😀"])
        ),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
        max_leaves=5,
    ),
    max_size=4,
)
written = st.builds(json.dumps, arguments, ensure_ascii=st.booleans(), indent=st.sampled_from([None, 0, 3]))
calls = st.lists(st.tuples(st.sampled_from(sorted(NAMES)), written), min_size=1, max_size=3)
cuts = st.lists(st.integers(0, 400), max_size=12)
prose = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<[{"), max_size=20)


@dataclass
class Heard:
    """What a caller of a stream makes of it."""

    text: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    taken_back: list[str] = field(default_factory=list)


def pieces(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted({place for place in places if 0 < place < len(text)}), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def hear(family: str, parts: list[str], *, parallel: bool = True, cut: bool = False) -> Heard:
    stream = CallStream(FAMILIES[family].read, NAMES, parallel=parallel)
    heard, open_calls, length = Heard(), dict[int, list[str]](), 0
    for news in [*map(stream.push, parts), stream.finish(cut=cut)]:
        heard.text += news.text
        length += sum(span.length for span in news.spans)
        assert "".join(span.text for span in news.spans if isinstance(span, Said)) == news.text
        for delta in news.calls:
            if delta.broken:
                heard.taken_back.append(open_calls.pop(delta.index)[1])
                continue
            assert (delta.id is None) == (delta.name is None) == (delta.index in open_calls)
            assert delta.index == len(open_calls) + len(heard.taken_back) or delta.index in open_calls
            if delta.name is not None:
                assert delta.id.startswith("call_")
                open_calls[delta.index] = [delta.name, ""]
            open_calls[delta.index][1] += delta.arguments
    heard.calls = [(name, text) for name, text in open_calls.values()]
    if not heard.calls:
        assert length == sum(map(len, parts)), "every character is accounted for"
    assert stream.has_calls == bool(heard.calls) or cut
    return heard


def write(family: str, made: list[tuple[str, str]]) -> str:
    """Calls as a model of that family writes them."""
    key = "parameters" if family.startswith("llama") else "arguments"
    each = [f'{{"name": "{name}", "{key}": {text}}}' for name, text in made]
    match family:
        case "hermes":
            return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in each)
        case "mistral":
            return f"[TOOL_CALLS] [{', '.join(each)}]"
        case "mistral-named":
            return "".join(f"{HIDDEN}{name}\ud801{text}" for name, text in made)
        case _:
            return "; ".join(each)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(made=calls, before=prose, places=cuts)
def test_calls_are_found_however_their_text_is_cut(family, made, before, places):
    text = before + write(family, made) if not family.startswith("llama") else write(family, made)
    for heard in (hear(family, [text]), hear(family, pieces(text, places)), hear(family, list(text))):
        assert heard.calls == made
        assert heard.text == (before.rstrip(" \t\n\r") if not family.startswith("llama") else "")
        assert not heard.taken_back


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), places=cuts, cut=st.booleans(), parallel=st.booleans())
def test_any_text_gives_the_same_whole_and_in_pieces(family, data, places, cut, parallel):
    scraps = st.sampled_from(SCRAPS[family] * 2 + JSON)
    text = "".join(data.draw(st.lists(st.one_of(scraps, st.text(max_size=2)), max_size=14)))
    whole = hear(family, [text], cut=cut, parallel=parallel)
    for parts in (pieces(text, places), list(text)):
        heard = hear(family, parts, cut=cut, parallel=parallel)
        assert (heard.text, heard.calls) == (whole.text, whole.calls)
    if not whole.calls:
        assert whole.text == text.translate({ord(mark): None for mark in "\ud800\ud801\ud802"}), "nothing is lost"
    for _, found in whole.calls[:-1] if cut else whole.calls:
        assert isinstance(json.loads(found), dict)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(made=calls, places=cuts)
def test_one_call_is_enough_where_no_more_are_wanted(family, made, places):
    heard = hear(family, pieces(write(family, made), places), parallel=False)
    assert heard.calls == made[:1]
    assert heard.text == ""


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(made=calls)
@example(made=[("add", '{"a": "<"}')])
def test_no_half_of_a_mark_is_ever_said(family, made):
    text = write(family, made)
    stream = CallStream(FAMILIES[family].read, NAMES)
    assert "".join(stream.push(letter).text for letter in text) == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_come_as_they_are_written(family):
    text = write(family, [("add", '{"text": "' + "x" * 40 + '"}')])
    stream = CallStream(FAMILIES[family].read, NAMES)
    fragments = [delta.arguments for letter in text for delta in stream.push(letter).calls]
    assert len([fragment for fragment in fragments if fragment]) > 40


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("hermes", '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "add", "arguments": [1]}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"arguments": {}}\n</tool_call>'),
        ("hermes", '<tool_call>{"name": "add", "extra": 1, "arguments": {}}</tool_call>'),
        ("hermes", "say <tool_call> and </tool_call>, he said"),
        ("hermes", '<tool_call>\n{"name": "add", "arg'),
        ("hermes", '<tool_call>{"name": "add", "name": "add", "arguments": {}}</tool_call>'),
        ("llama", '{"city": "Paris", "name": "add"}'),
        ("llama", '{"name": "Paris", "parameters": {}}'),
        ("llama", "{'name': 'add'}"),
        ("llama", "<|python_tag|>print(1)"),
        ("mistral", '[TOOL_CALLS] [{"name": "other", "arguments": {}}]'),
        ("mistral", "[TOOL_CALLS] nothing"),
        ("mistral", "[TOOL_CALLS]add[ARGS]7"),
        ("mistral", "[TOOL_CALLS]"),
    ],
)
def test_what_is_no_call_is_text_whole(family, text):
    for parts in ([text], list(text)):
        heard = hear(family, parts)
        assert (heard.text, heard.calls) == (text, [])


@pytest.mark.parametrize(
    ("family", "text", "said"),
    [
        ("hermes", 'so <tool_call>{"name": "add", "arguments": {"a": 1, }}</tool_call> it is', None),
        ("llama", '{"name": "add", "parameters": {"a": \'1\'}}', None),
        ("mistral-named", f'{HIDDEN}add\ud801{{"a": oops}}', 'add{"a": oops}'),
    ],
)
def test_a_call_that_breaks_is_taken_back_and_said_whole(family, text, said):
    heard = hear(family, list(text))
    assert (heard.text, heard.calls) == (said or text, [])
    assert len(heard.taken_back) == 1, "its beginning was told already"
    assert hear(family, [text]).taken_back == [], "nobody knew of it yet"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_without_room_to_end_stays_one(family):
    text = write(family, [("add", '{"a": "long and lo')])[: -3 if family == "hermes" else None]
    text = text[: text.index("long and lo") + 11]
    assert hear(family, list(text), cut=True).calls == [("add", '{"a": "long and lo')]
    assert hear(family, list(text), cut=False).calls == []


@pytest.mark.parametrize(
    ("family", "text", "made"),
    [
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', [("add", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "add"}</tool_call>', [("add", "{}")]),
        ("hermes", '<tool_call>{"name": "add", "arguments": {}}', [("add", "{}")]),
        ("llama", '{"type": "function", "name": "add", "parameters": {"a": 1}}', [("add", '{"a": 1}')]),
        ("llama", '<|python_tag|>{"name": "add", "parameters": {}}', [("add", "{}")]),
        ("llama", 'I will. <|python_tag|>{"name": "add", "parameters": {}}', [("add", "{}")]),
        ("mistral", '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "123456789"}]', [("add", '{"a": 1}')]),
        ("mistral", '[TOOL_CALLS]add[CALL_ID]abc123[ARGS]{"a": 1}', [("add", '{"a": 1}')]),
        ("mistral", '[TOOL_CALLS]add{"a": 1}', [("add", '{"a": 1}')]),
    ],
)
def test_variants_that_models_write_are_calls(family, text, made):
    assert hear(family, list(text)).calls == hear(family, [text]).calls == made


def test_text_around_calls_is_kept_and_whitespace_between_them_is_not():
    text = 'First.\n\n<tool_call>{"name": "add", "arguments": {}}</tool_call>\n \n<tool_call>{"name": "f-1"}</tool_call>\nDone. '
    for parts in ([text], list(text)):
        heard = hear("hermes", parts)
        assert heard.text == "First.\nDone. "
        assert [name for name, _ in heard.calls] == ["add", "f-1"]


def test_one_broken_call_harms_no_other():
    good = '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>'
    heard = hear("hermes", list(f'<tool_call>{{"name": "add", "arguments": {{oops}}}}</tool_call>{good}'))
    assert heard.calls == [("add", '{"a": 2}')]
    assert heard.text == '<tool_call>{"name": "add", "arguments": {oops}}</tool_call>'
