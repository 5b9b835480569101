"""Tokens that a form forces are guesses that are scored; where nothing is forced, prompt lookup guesses within the form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.types import Constraint, Sampling
from deployments.engine.draft import Drafter, Experience
from deployments.engine.forced import RARELY, ForcedDrafter, Habit
from deployments.engine.sequence import Sequence
from deployments.engine.structured import Grammars
from deployments.engine.tokenizer import Tokenizer
from tests.deployments.engine import families

SCHEMA = {"type": "object", "properties": {"temperature": {"const": "warm"}}, "required": ["temperature"]}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    families.build_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"eos_token_id": families.VOCABULARY - 1}))
    return directory


def held(directory: Path, constraint: Constraint, prompt: list[int]) -> Sequence:
    grammars = Grammars(directory)
    found = Sequence(
        request_id=0,
        index=0,
        tokens=prompt,
        num_prompt=len(prompt),
        sampling=Sampling(),
        max_tokens=99,
        stop_ids=frozenset(),
        seed=0,
    )
    found.matcher = grammars.matcher(constraint)
    return found


def say(sequence: Sequence, token: int) -> None:
    assert sequence.matcher
    sequence.matcher.take(token)
    sequence.tokens.append(token)


def test_what_a_form_forces_is_guessed_and_a_habit_is_learnt(directory: Path) -> None:
    sequence, habit = held(directory, Constraint("json_schema", json.dumps(SCHEMA)), [1, 2]), Habit()
    drafter = ForcedDrafter(sequence, Drafter(sequence.tokens, Experience()), habit, limit=4)
    for token in Tokenizer.load(directory).encode_inside('{"'):
        drafter.chance()
        say(sequence, token)
    for _ in range(4):
        before, chance = habit.share, drafter.chance()
        guesses = drafter.draft(3)
        assert chance == before
        assert 1 <= len(guesses) <= 3
        say(sequence, guesses[0])
        drafter.chance()
        assert habit.share > before, "it came as it was guessed"


def test_other_tokens_for_the_same_bytes_lower_the_chance(directory: Path) -> None:
    sequence, habit = held(directory, Constraint("json_schema", json.dumps(SCHEMA)), [1, 2]), Habit()
    drafter = ForcedDrafter(sequence, Drafter(sequence.tokens, Experience()), habit, limit=8)
    habit.share = 0.9
    tokenizer = Tokenizer.load(directory)
    wrong = 0
    for letter in '{"temperature"':
        chance, forced = drafter.chance(), drafter.draft(8)
        (token,) = tokenizer.encode_inside(letter)
        say(sequence, token)
        if forced and forced[0] != token:
            wrong += 1
            drafter.chance()
            assert habit.share < chance
    assert wrong, "letters alone are not how the tokenizer writes the name"


def test_a_doubtful_habit_is_rarely_asked_about(directory: Path) -> None:
    sequence, habit = held(directory, Constraint("regex", "a{400}"), [1, 2]), Habit()
    drafter = ForcedDrafter(sequence, Drafter(sequence.tokens, Experience()), habit, limit=8)
    habit.share = 0.1
    (letter,) = Tokenizer.load(directory).encode_inside("a")
    asked = 0
    for _ in range(32):
        asked += drafter.chance() == habit.share
        say(sequence, letter)
        habit.share = 0.1
    assert asked == 32 // RARELY


def test_lookup_guesses_no_further_than_the_form_lets_it(directory: Path) -> None:
    letters = Tokenizer.load(directory).encode_inside("ab")
    prompt = [*letters, 5, 6, *letters]  # after `ab` came 5, which the form forbids
    sequence = held(directory, Constraint("regex", "[ab]{1,20}"), prompt)
    lookup = Drafter(sequence.tokens, Experience())
    drafter = ForcedDrafter(sequence, lookup, Habit(), limit=4)
    assert drafter.chance() > 0
    assert lookup.draft(4)
    assert drafter.draft(4) == []
