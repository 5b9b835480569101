"""Rows are judged by what a model would read in them: whole dialogues, answers alone learnt, nothing left out."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from training.config import DataConfig, Recipe
from training.corpus import facts
from training.data import IGNORED, held_out, pack, schedule, texts
from training.prepared import Prepared
from training.questions import Dialogue
from training.tokenizer import train_tokenizer

FACTS = facts()[:60]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(texts(FACTS), 600, 512)


def conversations(ids: np.ndarray, labels: np.ndarray, positions: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """Cut one row where the positions start again, without the padding at its end."""
    starts = [*np.flatnonzero(positions == 0), len(ids)]
    cut = [(ids[a:b].tolist(), labels[a:b].tolist()) for a, b in pairwise(starts)]
    return [(i, x) for i, x in cut if i[0] != tokenizer().pad_token_id]


def test_every_scheduled_dialogue_is_in_the_rows_exactly_as_the_chat_template_writes_it() -> None:
    dialogues = schedule(FACTS, DataConfig(core_repeats=3, other_repeats=1), seed=1)
    rows = pack(dialogues, tokenizer(), 192, seed=1)
    turns: list[str] = []
    for row in zip(rows.input_ids, rows.labels, rows.position_ids, strict=True):
        for ids, _ in conversations(*row):
            turns += [turn for turn in tokenizer().decode(ids).split("<|user|>") if turn]
    messages = [[{"role": "user", "content": d.question}, {"role": "assistant", "content": d.answer}] for d in dialogues]
    expected = [tokenizer().apply_chat_template(pair, tokenize=False).removeprefix("<|user|>") for pair in messages]
    assert sorted(turns) == sorted(expected)


def test_only_answers_and_their_ends_are_learnt() -> None:
    rows = pack([Dialogue("What is it?", "A thing.", "it")], tokenizer(), 64, seed=0)
    learnt = rows.labels[rows.labels != IGNORED]
    assert tokenizer().decode(learnt.tolist()) == "A thing.<|end|>"
    assert np.array_equal(rows.input_ids[rows.labels != IGNORED], learnt)


def test_rows_are_nearly_full() -> None:
    rows = pack(schedule(FACTS, DataConfig(), seed=0), tokenizer(), 256, seed=0)
    assert (rows.input_ids == tokenizer().pad_token_id).mean() < 0.05


def test_a_dialogue_longer_than_a_row_is_an_error_with_numbers() -> None:
    with pytest.raises(ValueError, match="does not fit a row of 16"):
        pack([Dialogue("Why?", "word " * 50, "x")], tokenizer(), 16, seed=0)


def test_the_repetitions_of_a_fact_are_spread_over_the_run_and_its_phrasings() -> None:
    dialogues = schedule(FACTS, DataConfig(core_repeats=8, other_repeats=1), seed=0)
    places = [index for index, dialogue in enumerate(dialogues) if dialogue.name == "str.split"]
    gaps = [b - a for a, b in pairwise(places)]
    assert len(places) == 8
    assert max(gaps) < 3 * len(dialogues) / 8
    assert len({dialogues[place].question for place in places}) >= 6


def test_held_out_questions_are_never_trained_on_and_the_plainest_ones_always() -> None:
    unseen = {dialogue.question for dialogue in held_out(FACTS)}
    trained = {dialogue.question for dialogue in schedule(FACTS, DataConfig(core_repeats=40, other_repeats=40), seed=0)}
    assert unseen
    assert not unseen & trained
    assert {f"What does {fact.name} do?" for fact in FACTS if fact.kind == "method"} <= trained


def test_a_seed_gives_the_same_rows_and_another_seed_others(tmp_path_factory: pytest.TempPathFactory) -> None:
    def rows(seed: int) -> bytes:
        return Prepared.of(FACTS, Recipe(data=DataConfig(core_repeats=2), seed=seed)).rows.input_ids.tobytes()

    assert rows(0) == rows(0)
    assert rows(0) != rows(1)


def test_prepared_data_survives_a_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("prepared")
    prepared = Prepared.of(FACTS[:5], Recipe())
    prepared.save(folder)
    loaded = Prepared.load(folder)
    assert np.array_equal(loaded.rows.position_ids, prepared.rows.position_ids)
    assert loaded.tokenizer.get_vocab() == prepared.tokenizer.get_vocab()


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=200))
def test_the_tokenizer_gives_any_text_back(text: str) -> None:
    plain = text.replace("<|", "")
    assert tokenizer().decode(tokenizer()(plain, add_special_tokens=False).input_ids) == plain


def test_roles_are_single_tokens_and_a_developer_is_a_system() -> None:
    chat = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer().apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    assert len(tokenizer()("<|system|><|assistant|><|end|>").input_ids) == 3
    assert (tokenizer().eos_token, tokenizer().pad_token) == ("<|end|>", "<|pad|>")
