"""Prompt lookup against a search through the whole sequence."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from deployments.engine.draft import LONGEST, PLACES, Drafter, Experience


def search(tokens: list[int], count: int) -> list[int]:
    """The longest earlier match of the end, of equals the newest, and what came after it; a copy may run into itself."""
    size = len(tokens)
    ends = [end for end in range(size - 1, 1, -1) if tokens[end - 2 : end] == tokens[size - 2 :]][:PLACES]
    if not ends:
        return []
    source = max(ends, key=lambda end: (common(tokens[:end], tokens), end))
    copy = list(tokens)
    for place in range(count):
        copy.append(copy[source + place])
    return copy[size:]


def common(one: list[int], other: list[int]) -> int:
    """Length of the common end, as far as anybody looks."""
    length = 0
    while length < min(len(one), len(other), LONGEST) and one[-1 - length] == other[-1 - length]:
        length += 1
    return length


@limits(max_examples=300, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 2), min_size=1, max_size=40),
    news=st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=30),
    count=st.integers(0, 9),
)
def test_draft_is_what_a_search_through_all_tokens_finds(prompt: list[int], news: list[list[int]], count: int) -> None:
    tokens = list(prompt)
    drafter = Drafter(tokens, Experience())
    for more in ([], *news):
        tokens += more
        chance = drafter.chance()
        assert drafter.draft(count) == search(tokens, count)
        assert (chance > 0) == bool(search(tokens, 1))
        assert chance < 1


def test_a_loop_is_followed_beyond_the_end() -> None:
    drafter = Drafter([9, 1, 2, 3, 1, 2, 3, 1, 2], Experience())
    assert drafter.chance() > 0
    assert drafter.draft(7) == [3, 1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("tokens", [[1], [1, 2], [1, 1], [1, 2, 3, 4]])
def test_nothing_is_guessed_without_a_match(tokens: list[int]) -> None:
    drafter = Drafter(tokens, Experience())
    assert (drafter.chance(), drafter.draft(4)) == (0.0, [])


def test_large_tokens_are_not_confused() -> None:
    pairs = [(1, 2**31 - 1), (2**31 - 1, 1), (0, 2), (2, 0)]
    drafter = Drafter([token for pair in pairs for token in (*pair, 7, 8, 9)][:-3], Experience())
    assert drafter.chance() == 0.0


def chances(text: list[int]) -> list[float]:
    """What a drafter says before each token of a text from the eighth on, where it guesses at all."""
    tokens = text[:8]
    drafter, said = Drafter(tokens, Experience()), []
    for token in text[8:]:
        said.append(drafter.chance())
        tokens.append(token)
    return [chance for chance in said if chance]


def test_chance_follows_the_guesses_that_came_true_though_nobody_tried_them() -> None:
    loop, numbers = [1, 2, 3, 4] * 40, random.Random(0)
    noise = [numbers.randrange(20) for _ in range(2000)]
    assert chances(loop)[-1] > 0.9
    assert max(chances(noise)[-100:]) < 0.5


def test_an_unused_guess_counts_once() -> None:
    tokens = [1, 2, 3, 1, 2]
    drafter = Drafter(tokens, Experience())
    before = drafter.chance()
    assert drafter.chance() == before, "nothing has come yet"
    tokens.append(3)
    drafter.chance()
    tokens += [9, 9, 1, 2]
    drafter.chance()
    assert drafter.draft(2) == [3, 9]
