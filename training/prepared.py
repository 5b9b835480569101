"""What a run reads: the tokenizer and the packed rows, made once by the driver and stored as one thing with a digest.

Workers on any node fetch it from the run's storage; the digest of what it was made from is the lineage of the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from training.config import Recipe
from training.corpus import Fact
from training.data import Rows, pack, schedule, texts
from training.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Prepared:
    """Tokenizer and rows of one run."""

    tokenizer: PreTrainedTokenizerFast
    rows: Rows

    @classmethod
    def of(cls, facts: Sequence[Fact], recipe: Recipe) -> Prepared:
        tokenizer = train_tokenizer(texts(facts), recipe.model.vocab_size, recipe.model.max_position_embeddings)
        dialogues = schedule(facts, recipe.data, recipe.seed)
        return cls(tokenizer, pack(dialogues, tokenizer, recipe.data.row_tokens, recipe.seed))

    @classmethod
    def load(cls, directory: Path) -> Prepared:
        from safetensors.numpy import load_file
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "tokenizer")
        return cls(tokenizer, Rows(**load_file(directory / "rows.safetensors")))

    def save(self, directory: Path) -> None:
        from safetensors.numpy import save_file

        self.tokenizer.save_pretrained(directory / "tokenizer")
        rows = self.rows
        arrays = {"input_ids": rows.input_ids, "labels": rows.labels, "position_ids": rows.position_ids}
        save_file(arrays, directory / "rows.safetensors")

    def num_steps(self, recipe: Recipe) -> int:
        """Whole optimiser steps; the rest of the rows is left out."""
        return len(self.rows) // recipe.optimisation.global_rows


def save_facts(facts: Sequence[Fact], directory: Path) -> None:
    """The data set as a person can read it: one JSON object a line."""
    lines = (json.dumps(asdict(fact), sort_keys=True) + "\n" for fact in facts)
    (directory / "facts.jsonl").write_text("".join(lines), encoding="utf-8")
