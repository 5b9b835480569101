"""The JSON files of a model directory, read with suspicion. Knows nothing of weights and runs nothing of the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import ModelNotServable

MAX_JSON_BYTES = 256 << 20
"""Longest JSON file that is read: the largest tokenizer.json in use has some 40 MB."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or {} where there is no such file. Raises ModelNotServable for anything but an object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelNotServable(f"{path.name} has more than {MAX_JSON_BYTES >> 20} MiB, which no such file needs")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelNotServable(f"{path.name} can't be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelNotServable(f"{path.name} holds a {type(content).__name__} where an object belongs")
    return content


def positive(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """The first of `names` that is set, as a positive integer. Raises ModelNotServable without one."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 40:
            raise ModelNotServable(f"config.json: {name} must be a positive integer, not {value!r:.80}")
        return value
    if default is None:
        raise ModelNotServable(f"config.json lacks {names[0]}")
    return default


def context_length(config: Mapping[str, Any], default: int | None = None) -> int:
    """Tokens that the model was made for."""
    return positive(config, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", default=default)


def token_ids(value: Any) -> frozenset[int]:
    """Token ids as configurations write them: none, one or a list."""
    values = value if isinstance(value, list) else [value]
    return frozenset(v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0)
