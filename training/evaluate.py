"""How good a trained model is: loss on questions in words it never saw, and whether it gives the answers it was taught.

It reads a model directory and nothing else, on the CPU of whoever calls it.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.corpus import Fact
from training.data import held_out, pack
from training.questions import Dialogue, ask

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

NEAR = 0.9
"""Similarity (`difflib` ratio) from which an answer counts as near."""
_BATCH = 32
_MAX_NEW_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Scores:
    """Shares are of greedy answers, from 0 to 1; losses in nats a token."""

    held_out_loss: float
    core_exact: float
    core_near: float
    other_exact: float
    other_near: float
    held_out_near: float

    def as_metrics(self) -> dict[str, float]:
        return asdict(self)


class Student:
    """A loaded model that answers one question or many, greedily, through its own chat template."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # two bars on one terminal would draw over each other
        self.model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(directory).eval()
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(directory)

    def answer(self, questions: Sequence[str]) -> list[str]:
        return [answer for batch in _batches(questions) for answer in self._answer(batch)]

    def loss(self, dialogues: Sequence[Dialogue], row_tokens: int) -> float:
        """Mean cross entropy of the answers' tokens."""
        import torch

        from training.model import Learner

        rows = pack(dialogues, self.tokenizer, row_tokens, seed=0)
        learner = Learner(self.model, torch.float32)
        total, count = 0.0, 0
        with torch.inference_mode():
            for start in range(0, len(rows), _BATCH):
                batch = [
                    torch.from_numpy(a[start : start + _BATCH]).long() for a in (rows.input_ids, rows.labels, rows.position_ids)
                ]
                learnt = int((batch[1][:, 1:] >= 0).sum())
                total, count = total + learner(*batch).item() * learnt, count + learnt
        return total / max(count, 1)

    def _answer(self, questions: Sequence[str]) -> list[str]:
        import torch

        chats: Any = [[{"role": "user", "content": question}] for question in questions]
        inputs: Any = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            output: Any = self.model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
        return list(self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def evaluate(student: Student, facts: Sequence[Fact], row_tokens: int, seed: int, sample: int = 48) -> Scores:
    """Ask `sample` core facts and as many others as they were taught, and as many in unseen words."""
    rng = random.Random(seed)  # noqa: S311
    core = _sample(rng, [ask(fact)[0] for fact in facts if fact.core], sample)
    other = _sample(rng, [ask(fact)[0] for fact in facts if not fact.core], sample)
    unseen = held_out(facts)
    asked = _sample(rng, unseen, sample)
    matches = {name: _match(student, dialogues) for name, dialogues in (("core", core), ("other", other), ("unseen", asked))}
    return Scores(
        held_out_loss=student.loss(_sample(rng, unseen, 4 * sample), row_tokens),
        core_exact=matches["core"][0],
        core_near=matches["core"][1],
        other_exact=matches["other"][0],
        other_near=matches["other"][1],
        held_out_near=matches["unseen"][1],
    )


def _match(student: Student, dialogues: Sequence[Dialogue]) -> tuple[float, float]:
    """Shares of exact and of near answers; 0 when nothing was asked."""
    answers = student.answer([dialogue.question for dialogue in dialogues])
    pairs = [(answer, dialogue.answer) for answer, dialogue in zip(answers, dialogues, strict=True)]
    exact = sum(given == taught for given, taught in pairs)
    near = sum(is_near(given, taught) for given, taught in pairs)
    return exact / max(len(pairs), 1), near / max(len(pairs), 1)


def is_near(given: str, taught: str) -> bool:
    return difflib.SequenceMatcher(None, given, taught, autojunk=False).ratio() >= NEAR


def _sample(rng: random.Random, dialogues: list[Dialogue], size: int) -> list[Dialogue]:
    return rng.sample(dialogues, min(size, len(dialogues)))


def _batches(questions: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(questions), _BATCH):
        yield questions[start : start + _BATCH]
