"""Streams give the same text as a whole, whatever way they are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.detokenizer import Detokenizer, first_stop
from deployments.engine.tokenizer import Tokenizer
from tests.deployments.engine import texts

LETTERS = st.text("abc ü東😀", max_size=40)
STOPS = st.lists(st.text("abc ü東😀", min_size=1, max_size=4), max_size=3).map(tuple)


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece", "metaspace"])
def tokenizer(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "byte-level":
        return Tokenizer.load(texts.byte_level(directory))
    return Tokenizer.load(texts.sentencepiece(directory, legacy=request.param == "sentencepiece"))


def cut(data, items: list[int]) -> list[list[int]]:
    """`items` in runs of any length, empty ones included."""
    at = [0, *sorted(data.draw(st.lists(st.integers(0, len(items)), max_size=12))), len(items)]
    return [items[start:end] for start, end in pairwise(at)]


def simple(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The specification: read letter by letter until the text ends in a stop string, the longest if there are several."""
    for end in range(1, len(text) + 1):
        for string in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(string):
                return text[: end - len(string)], True
    return text, False


@settings(deadline=None, max_examples=300)
@given(data=st.data(), text=LETTERS, stop=STOPS)
def test_any_split_gives_the_text_up_to_the_first_stop(tokenizer, data, text, stop):
    ids = tokenizer.encode(text)
    stream = Detokenizer(tokenizer, stop)
    pieces = [stream.push(run) for run in cut(data, ids)] + [stream.finish()]
    assert ("".join(piece.text for piece in pieces), stream.stopped) == simple(tokenizer.decode(ids), stop)
    assert pieces[-1].stopped == stream.stopped


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_random_tokens_stream_as_they_decode(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=20))
    stream = Detokenizer(tokenizer)
    assert "".join([*(stream.push(run).text for run in cut(data, ids)), stream.finish().text]) == tokenizer.decode(ids)


@settings(deadline=None, max_examples=200)
@given(text=LETTERS, stop=STOPS)
def test_a_stop_takes_exactly_the_tokens_that_completed_it(tokenizer, text, stop):
    ids = tokenizer.encode(text)
    stream = Detokenizer(tokenizer, stop)
    used = stream.push(ids).num_tokens
    one_by_one = Detokenizer(tokenizer, stop)
    assert used == sum(one_by_one.push([token_id]).num_tokens for token_id in ids)
    if stream.stopped:
        assert not simple(tokenizer.decode(ids[: used - 1]), stop)[1]
        assert simple(tokenizer.decode(ids[:used]), stop)[1]
        assert stream.push(ids) == type(stream.push([]))("", True, 0)


def test_no_half_character_is_ever_shown(tokenizer):
    stream = Detokenizer(tokenizer)
    shown = [stream.push([token_id]).text for token_id in tokenizer.encode("a😀東ü 😀")]
    assert "\ufffd" not in "".join(shown)
    assert "".join(shown) == "a😀東ü 😀"
    assert stream.finish().text == ""


def test_bytes_that_are_no_character_become_one_mark(tokenizer):
    halves = [token_id for token_id in range(tokenizer.vocab_size) if tokenizer.token_bytes(token_id) == b"\xf0"]
    stream = Detokenizer(tokenizer, prompt_ids=tokenizer.encode("x"))
    assert stream.push(halves[:1]).text == ""
    assert stream.finish().text == "\ufffd"


def test_text_that_may_become_a_stop_waits(tokenizer):
    stream = Detokenizer(tokenizer, ("STOP",), prompt_ids=tokenizer.encode("x"))
    assert stream.push(_bytewise(tokenizer, "abST")).text == "ab"
    assert stream.push(_bytewise(tokenizer, "x")).text == "STx"
    assert stream.push(_bytewise(tokenizer, "STO")).text == ""
    assert stream.finish().text == "STO"


def test_special_tokens_show_nothing_and_split_no_stop(tokenizer):
    special = min(tokenizer.special_ids)
    stream = Detokenizer(tokenizer, ("ab",), prompt_ids=tokenizer.encode("x"))
    ids = [special, *_bytewise(tokenizer, "xa"), special, *_bytewise(tokenizer, "b"), special]
    assert stream.push(ids).text == "x"
    assert stream.stopped


def test_an_answer_keeps_the_space_after_its_prompt(tmp_path):
    tokenizer = Tokenizer.load(texts.sentencepiece(tmp_path))
    prompt, answer = tokenizer.encode("Hello"), tokenizer.encode("world")[1:]
    assert Detokenizer(tokenizer, prompt_ids=prompt).push(answer).text == " world"
    assert Detokenizer(tokenizer, prompt_ids=prompt[:1]).push(answer).text == "world"
    assert tokenizer.decode(prompt + answer) == "Hello world"


def test_of_two_stops_that_end_together_the_longer_counts():
    assert first_stop("xabc", ("bc", "abc")) == (1, 4)
    assert first_stop("xabcd", ("abcd", "bc")) == (2, 4)
    assert first_stop("xyz", ("a",)) is None


def test_work_per_token_does_not_grow_with_the_text(tokenizer):
    """Counted rather than timed: the decoder sees each byte once, and no more text is held than a stop string is long."""
    stream = Detokenizer(tokenizer, ("a" * 5 + "b",))
    for token_id in _bytewise(tokenizer, "a") * 5000:
        stream.push([token_id])
        assert len(stream._held) <= 5


def _bytewise(tokenizer: Tokenizer, text: str) -> list[int]:
    """`text` in tokens of one byte each."""
    by_bytes = {tokenizer.token_bytes(token_id): token_id for token_id in reversed(range(tokenizer.vocab_size))}
    return [by_bytes[bytes([byte])] for byte in text.encode()]
