"""What is asked of an encoder, as rows, and what comes out of it, as numbers: embeddings, scores, probabilities.

An embedding model reranks by cosine of query and text, a classifier with one label by its probability that the pair fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import InvalidRequest, ModelNotSupported
from cluster.types import Encode
from deployments.encode.inspection import EncoderInfo
from deployments.encode.row import Floats, Row
from deployments.encode.tokenizer import Text, Tokenizer

QUERY, DOCUMENT = ("query",), ("document", "passage", "corpus")
"""Names that prompts for the two sides of a search have, the first that exists counts."""


class Tasks:
    """Everything but the model. Its methods block: a call's texts may be megabytes."""

    def __init__(self, directory: Path, info: EncoderInfo) -> None:
        """Raises ModelNotServable."""
        self._info = info
        self._prompts = dict(info.prompts)
        self._tokenizer = Tokenizer(directory, info)

    def check(self, call: Encode, width: int) -> None:
        """Raises ModelNotSupported, or InvalidRequest for what this model doesn't offer."""
        info = self._info
        if call.task == "embed" and info.task != "embed":
            raise ModelNotSupported("This model is a classifier, which has no embeddings: use /v1/classify.", param="model")
        if call.task == "classify" and info.task != "classify":
            raise ModelNotSupported("This model makes embeddings, and has no labels: use /v1/embeddings.", param="model")
        if call.task == "rerank" and len(info.labels) > 1:
            message = f"This model has {len(info.labels)} labels; to rerank takes one score: use /v1/classify."
            raise ModelNotSupported(message, param="model")
        if call.prompt_name is not None and call.prompt_name not in self._prompts:
            known = ", ".join(self._prompts) or "none"
            raise InvalidRequest(f"The model has no prompt of that name; it has {known}.", param="prompt_name")
        if call.cut is not None and not (call.cut == -1 or 0 < call.cut <= info.max_tokens):
            raise InvalidRequest(
                f"truncate_prompt_tokens must be -1 or within 1 and {info.max_tokens}.", param="truncate_prompt_tokens"
            )
        if call.dimensions is not None:
            self._check_dimensions(call.dimensions, width)

    def _check_dimensions(self, wanted: int, width: int) -> None:
        if wanted == width or (self._info.any_length and wanted < width):
            return
        allowed = self._info.matryoshka
        if not allowed and not self._info.any_length:
            raise InvalidRequest(f"This model's embeddings have {width} dimensions and can't be cut.", param="dimensions")
        if wanted not in allowed:
            known = f"one of {', '.join(map(str, allowed))} or {width}" if allowed else f"at most {width}"
            raise InvalidRequest(f"dimensions must be {known}.", param="dimensions")

    def rows(self, call: Encode) -> list[Row]:
        """Raises ContextLengthExceeded and InvalidRequest."""
        cut = self._info.max_tokens if call.cut == -1 else call.cut
        if call.task == "rerank":
            return self._rerank_rows(call, cut)
        if call.ids:
            return self._tokenizer.given(call.ids, cut=cut, param="input")
        prompt = self._prompt((call.prompt_name or self._info.default_prompt or "",))
        return self._tokenizer.rows([prompt + text for text in call.texts], cut=cut, param="input")

    def _rerank_rows(self, call: Encode, cut: int | None) -> list[Row]:
        query = call.query or ""
        if self._info.task == "classify":
            pairs: list[Text] = [(query, text) for text in call.texts]
            return self._tokenizer.rows(pairs, cut=cut, param="documents")
        asked = self._tokenizer.rows([self._prompt(QUERY) + query], cut=cut, param="query")
        prompt = self._prompt(DOCUMENT)
        return asked + self._tokenizer.rows([prompt + text for text in call.texts], cut=cut, param="documents")

    def _prompt(self, names: Sequence[str]) -> str:
        found = next((self._prompts[name] for name in names if name in self._prompts), None)
        return self._prompts.get(self._info.default_prompt or "", "") if found is None else found

    def finish(self, call: Encode, vectors: Floats) -> Floats:
        """`N x width`: what the caller gets for each of its inputs."""
        if call.task == "embed":
            return vectors if call.dimensions in (None, vectors.shape[1]) else unit(vectors[:, : call.dimensions])
        if call.task == "classify":
            return probabilities(vectors, independent=self._info.multi_label or vectors.shape[1] == 1)
        if self._info.task == "classify":
            return probabilities(vectors, independent=True)
        vectors = unit(vectors)
        return vectors[1:] @ vectors[:1].T


def unit(vectors: Floats) -> Floats:
    """Of length one; a zero vector stays one."""
    lengths: Floats = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    shortened: Floats = (vectors / lengths).astype(np.float32)
    return shortened


def probabilities(logits: Floats, *, independent: bool) -> Floats:
    """Of each label by itself, or of one among all."""
    if independent:
        fits: Any = 1 / (1 + np.exp(-np.clip(logits, -80, 80)))
        independently: Floats = fits
        return independently
    weights: Any = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Floats = weights / weights.sum(axis=1, keepdims=True)
    return shares
