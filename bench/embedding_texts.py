"""The texts that the benchmark of embeddings encodes, and what its model makes of them before it computes."""

from __future__ import annotations

import inspect as python
import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module

import numpy as np
from tokenizers import Tokenizer

from cluster.types import Encode
from deployments.encode.inspection import inspect
from deployments.encode.tasks import Tasks
from pipelines import packaged

LIMIT = 256
"""Tokens that the model takes."""

Texts = Sequence[str]


def works(count: int) -> dict[str, list[str]]:
    """Rows of 16 tokens, of real text's own lengths, and of 256; the special tokens count."""
    words = " ".join(documentation(4 * count)).split()
    plain = Tokenizer.from_file(str(packaged.files() / "tokenizer.json"))
    plain.no_truncation()
    plain.no_padding()

    def cut(tokens: int, number: int) -> list[str]:
        texts = []
        for start in range(number):
            chosen = words[(start * tokens) % (len(words) - tokens) :][:tokens]
            while (over := len(plain.encode(" ".join(chosen)).ids) - tokens) > 0:
                chosen = chosen[: -max(1, over // 8)]
            texts.append(" ".join(chosen))
        return texts

    return {"16 tokens": cut(16, count), "mixed": documentation(count), "256 tokens": cut(LIMIT, count // 8)}


def documentation(count: int) -> list[str]:
    """Paragraphs of the running Python's own documentation strings, in a fixed shuffled order; all fit the model."""
    found: dict[str, None] = {}
    for module in sorted(module.name for module in pkgutil.iter_modules() if module.name in sys.stdlib_module_names):
        if module.startswith("_") or module in ("antigravity", "this", "idlelib", "turtledemo", "lib2to3", "test"):
            continue
        try:
            members = vars(import_module(module)).values()
        except ImportError:
            continue
        for member in members:
            text = python.getdoc(member) if callable(member) else None
            found |= dict.fromkeys(part for part in (text or "").split("\n\n") if 20 < len(part) < 1200)
    parts = sorted(found)
    order = np.random.default_rng(0).permutation(len(parts))
    lengths = [len(row) for row in tasks("float32").rows(asked(parts, cut=-1))]
    chosen = [parts[place] for place in order if lengths[place] < LIMIT]
    return [chosen[place % len(chosen)] for place in range(count)]


def asked(texts: Texts, cut: int | None = None) -> Encode:
    return Encode("bench", "bench", "embed", texts=tuple(texts), cut=cut)


def tasks(dtype: str) -> Tasks:
    return Tasks(packaged.files(), inspect(packaged.files(), tp=1, dtype=dtype))
