"""From facts to the rows of tokens that a run trains on: a schedule of dialogues, conversations of a few turns, packing.

Everything follows from the facts, the recipe and its seed, so every worker could make the same rows, and resuming needs no more
than the number of the next step. Legend: N rows, T tokens of a row.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.config import DataConfig
from training.corpus import Fact
from training.questions import Dialogue, ask, is_held_out, small_talk

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
TURNS = (1, 1, 1, 2, 3)
"""How many dialogues follow each other in one conversation, drawn with equal chance."""

OPEN_ROWS = 8


@dataclass(frozen=True, slots=True)
class Rows:
    """`input_ids`, `labels` and `position_ids`, int32 [N, T] each. Positions start again with every conversation, and that is how
    the model is told to look at nothing before; labels are `IGNORED` except on answers."""

    input_ids: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    position_ids: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.input_ids)


def schedule(facts: Sequence[Fact], config: DataConfig, seed: int) -> list[Dialogue]:
    """Every dialogue of the run in training order. The repetitions of one fact are spread evenly, each with its next phrasing."""
    rng = random.Random(seed)  # noqa: S311
    timed: list[tuple[float, Dialogue]] = []
    for phrasings, repeats in _decks(facts, config):
        rng.shuffle(phrasings)
        timed += [((turn + rng.random()) / repeats, phrasings[turn % len(phrasings)]) for turn in range(repeats)]
    timed.sort(key=lambda pair: pair[0])
    return [dialogue for _, dialogue in timed]


def held_out(facts: Iterable[Fact]) -> list[Dialogue]:
    """Known facts asked in words that were never trained on."""
    return [dialogue for fact in facts for dialogue in ask(fact) if is_held_out(fact, dialogue)]


def texts(facts: Iterable[Fact]) -> Iterator[str]:
    """What the tokenizer learns from: every answer and question once."""
    for fact in facts:
        for dialogue in ask(fact):
            yield dialogue.question
        yield fact.answer
        if fact.signature:
            yield fact.signature
    for dialogue in small_talk():
        yield f"{dialogue.question} {dialogue.answer}"


def pack(dialogues: Sequence[Dialogue], tokenizer: PreTrainedTokenizerFast, row_tokens: int, seed: int) -> Rows:
    """Rows in schedule order, nearly full. Raises ValueError when one dialogue alone is longer than a row."""
    import numpy as np

    rng = random.Random(seed)  # noqa: S311
    conversations = _conversations(_encode(dialogues, tokenizer), row_tokens, rng)
    rows = list(_best_fit(conversations, row_tokens))
    shape = (len(rows), row_tokens)
    packed = Rows(np.full(shape, tokenizer.pad_token_id, np.int32), np.full(shape, IGNORED, np.int32), np.zeros(shape, np.int32))
    for index, row in enumerate(rows):
        _fill(packed, index, row)
    return packed


@dataclass(slots=True)
class _Conversation:
    ids: list[int]
    labels: list[int]


def _decks(facts: Sequence[Fact], config: DataConfig) -> Iterator[tuple[list[Dialogue], int]]:
    for fact in facts:
        phrasings = [dialogue for dialogue in ask(fact) if not is_held_out(fact, dialogue)]
        yield phrasings, config.core_repeats if fact.core else config.other_repeats
    for dialogue in small_talk():
        yield [dialogue], config.core_repeats


def _encode(dialogues: Sequence[Dialogue], tokenizer: PreTrainedTokenizerFast) -> Iterator[_Conversation]:
    """Exactly the tokens that the chat template gives, the answer's end included; only the answer is learnt."""
    prompts = tokenizer([f"<|user|>{d.question}<|end|><|assistant|>" for d in dialogues], add_special_tokens=False).input_ids
    answers = tokenizer([f"{d.answer}<|end|>" for d in dialogues], add_special_tokens=False).input_ids
    for prompt, answer in zip(prompts, answers, strict=True):
        yield _Conversation(prompt + answer, [IGNORED] * len(prompt) + answer)


def _conversations(turns: Iterable[_Conversation], row_tokens: int, rng: random.Random) -> Iterator[_Conversation]:
    current, left = _Conversation([], []), rng.choice(TURNS)
    for turn in turns:
        if len(turn.ids) > row_tokens:
            raise ValueError(f"a dialogue of {len(turn.ids)} tokens does not fit a row of {row_tokens}")
        if left == 0 or len(current.ids) + len(turn.ids) > row_tokens:
            yield current
            current, left = _Conversation([], []), rng.choice(TURNS)
        current.ids += turn.ids
        current.labels += turn.labels
        left -= 1
    yield current


def _best_fit(conversations: Iterable[_Conversation], row_tokens: int) -> Iterator[list[_Conversation]]:
    """Put each conversation into the fullest of a few open rows that still has room; when none has, the fullest row is done."""
    rows: list[tuple[int, list[_Conversation]]] = []  # tokens used, conversations
    for conversation in conversations:
        fitting = [index for index, (used, _) in enumerate(rows) if used + len(conversation.ids) <= row_tokens]
        if not fitting and len(rows) == OPEN_ROWS:
            yield rows.pop(max(range(len(rows)), key=lambda index: rows[index][0]))[1]
        if fitting:
            index = max(fitting, key=lambda index: rows[index][0])
            used, row = rows.pop(index)
        else:
            used, row = 0, []
        rows.append((used + len(conversation.ids), [*row, conversation]))
    yield from (row for _, row in rows)


def _fill(packed: Rows, index: int, row: list[_Conversation]) -> None:
    start = 0
    for conversation in row:
        end = start + len(conversation.ids)
        packed.input_ids[index, start:end] = conversation.ids
        packed.labels[index, start:end] = conversation.labels
        packed.position_ids[index, start:end] = range(end - start)
        start = end
    packed.position_ids[index, start:] = range(packed.position_ids.shape[1] - start)
