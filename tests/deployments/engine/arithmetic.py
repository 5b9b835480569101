"""Languages of few rules, in the place of a model, so that every answer is known beforehand or can be trusted."""

from __future__ import annotations

import zlib

import numpy as np
import torch

from cluster.types import Sampling
from deployments.engine.batch import Batch
from deployments.engine.messages import Request

VOCABULARY = 300


def count_up(batch: Batch) -> torch.Tensor:
    """`Engine.execute`: after token t comes (t + 1) mod V."""
    last = torch.from_numpy(batch.tokens[batch.rows].astype("int64"))
    return torch.nn.functional.one_hot((last + 1) % VOCABULARY, VOCABULARY).float() * 100


class Recall:
    """`Engine.execute` that remembers tokens where a model has keys and values: in the slots of its blocks. The next token hangs on
    the last one, a little also on all that stand before it in the sequence's blocks, so that a stale slot changes the answer."""

    def __init__(self, num_blocks: int, block_size: int, *, vocabulary: int = 12, surprise: float = 0.3) -> None:
        self.slots = np.full((num_blocks, block_size), -1)
        self.surprise = surprise
        self.habits = np.random.default_rng(0).normal(size=(vocabulary, vocabulary)).astype(np.float32)

    def __call__(self, batch: Batch) -> torch.Tensor:
        size, rows = self.slots.shape[1], {}
        first = 0
        for table, start, count in zip(batch.tables, batch.starts.tolist(), batch.counts.tolist(), strict=True):
            for place in range(start, start + count):
                self.slots[table[place // size], place % size] = batch.tokens[first + place - start]
            text = self.slots[table].ravel()
            rows |= {first + place: text[: start + place + 1] for place in range(count)}
            first += count
        return torch.from_numpy(np.stack([self._logits(rows[row]) for row in batch.rows.tolist()] or [self.habits[0][:0]]))

    def _logits(self, text: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(zlib.crc32(text.tobytes())).normal(size=len(self.habits))
        return (self.habits[text[-1]] + self.surprise * noise).astype(np.float32)


def request(number: int, prompt: list[int], max_tokens: int = 4, *, stop_ids: tuple[int, ...] = (), **sampling: object) -> Request:
    return Request(
        id=number,
        prompt=prompt,
        sampling=Sampling(**{"temperature": 0.0} | sampling),  # type: ignore[arg-type]
        max_tokens=max_tokens,
        stop_ids=list(stop_ids),
        seed=0,
    )
