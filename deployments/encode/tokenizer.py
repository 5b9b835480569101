"""Texts and pairs of texts to rows, with the special tokens that the model was trained with. Blocking: runs beside the event loop.

The tokenizer's own truncation and padding are off: a text that is too long is refused, or cut because the caller said so.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Fast
from tokenizers import normalizers

from cluster.errors import ContextLengthExceeded, InvalidRequest, ModelNotServable
from deployments.encode.inspection import EncoderInfo
from deployments.encode.row import Row
from deployments.engine.model_config import read_json

Text = str | tuple[str, str]

MAX_CHARS_PER_TOKEN = 1000
"""A text of so many characters for each token that fits is too long in any language; it isn't even read."""


class Tokenizer:
    """Thread-safe."""

    def __init__(self, directory: Path, info: EncoderInfo) -> None:
        """Raises ModelNotServable."""
        self._info = info
        self._fast, self._cutting = _load(directory, info), _load(directory, info)
        inputs = read_json(directory / "tokenizer_config.json").get("model_input_names")
        self._has_segments = not isinstance(inputs, list) or "token_type_ids" in inputs
        self._lock = threading.Lock()  # a limit for cutting is a state of the tokenizer
        largest = self._fast.get_vocab_size() - 1
        if largest >= info.vocab_size:
            raise ModelNotServable(f"the tokenizer knows {largest + 1} tokens, and the model has only {info.vocab_size}")

    def rows(self, texts: Sequence[Text], *, cut: int | None, param: str) -> list[Row]:
        """One row a text or pair. `cut`: keep at most so many tokens. Raises ContextLengthExceeded and InvalidRequest, which say
        which of several texts it is."""
        for place, text in enumerate(texts):
            size = len(text) if isinstance(text, str) else len(text[0]) + len(text[1])
            if size > self._info.max_tokens * MAX_CHARS_PER_TOKEN:
                raise self._too_long(f"has {size} characters", place, len(texts), param)
        if cut is None:
            found = self._fast.encode_batch_fast(list(texts))
        else:
            with self._lock:
                self._cutting.enable_truncation(max(cut, self._cutting.num_special_tokens_to_add(isinstance(texts[0], tuple)) + 1))
                found = self._cutting.encode_batch_fast(list(texts))
        paired = self._has_segments and isinstance(texts[0], tuple)
        rows = [Row(encoding.ids, encoding.type_ids if paired else None) for encoding in found]
        for place, row in enumerate(rows):
            self._check(row, place, len(rows), param)
        return rows

    def given(self, ids: Sequence[Sequence[int]], *, cut: int | None, param: str) -> list[Row]:
        """Token ids that the caller has, as they are. Raises as `rows` does."""
        rows = []
        for place, tokens in enumerate(ids):
            row = Row(tokens if cut is None else tokens[:cut])
            self._check(row, place, len(ids), param)
            if not 0 <= int(row.ids.min()) <= int(row.ids.max()) < self._info.vocab_size:
                message = f"A token id is outside 0..{self._info.vocab_size - 1}; token ids must be this model's own."
                raise InvalidRequest(message, param=_named(param, place, len(ids)))
            rows.append(row)
        return rows

    def _check(self, row: Row, place: int, count: int, param: str) -> None:
        if not len(row):
            raise InvalidRequest("An input has no token.", param=_named(param, place, count))
        if len(row) > self._info.max_tokens:
            raise self._too_long(f"has {len(row)} tokens", place, count, param)

    def _too_long(self, what: str, place: int, count: int, param: str) -> ContextLengthExceeded:
        return ContextLengthExceeded(
            f"The model takes {self._info.max_tokens} tokens, and an input {what}: split it, or set truncate_prompt_tokens.",
            param=_named(param, place, count),
        )


def _named(param: str, place: int, count: int) -> str:
    return f"{param}[{place}]" if count > 1 else param


def _load(directory: Path, info: EncoderInfo) -> Fast:
    try:
        fast = Fast.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the Rust library raises nothing narrower
        raise ModelNotServable(f"tokenizer.json can't be read: {error}") from None
    fast.no_truncation()
    fast.no_padding()
    if info.lowercase:
        lower = normalizers.Lowercase()
        fast.normalizer = normalizers.Sequence([lower, fast.normalizer]) if fast.normalizer else lower
    return fast
