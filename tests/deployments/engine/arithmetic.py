"""A language of one rule, in the place of a model: after token t comes (t + 1) mod V. So every answer is known beforehand."""

from __future__ import annotations

import torch

from cluster.types import Sampling
from deployments.engine.batch import Batch
from deployments.engine.engine import Request

VOCABULARY = 300


def count_up(batch: Batch) -> torch.Tensor:
    """`Engine.execute`: logits that name the successor of each sampled row's last token."""
    ends = batch.counts.cumsum() - 1
    last = torch.from_numpy(batch.tokens[ends][batch.sampled].astype("int64"))
    return torch.nn.functional.one_hot((last + 1) % VOCABULARY, VOCABULARY).float() * 100


def request(number: int, prompt: list[int], max_tokens: int = 4, *, stop_ids: tuple[int, ...] = (), **sampling: object) -> Request:
    return Request(
        id=number,
        prompt=prompt,
        sampling=Sampling(**{"temperature": 0.0} | sampling),  # type: ignore[arg-type]
        max_tokens=max_tokens,
        stop_ids=list(stop_ids),
        seed=0,
    )
