"""config.json and its kin, read with suspicion: the shape of a model, and no more. Runs nothing and knows nothing of weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import ModelNotServable

MAX_JSON_BYTES = 256 << 20
"""Longest JSON file that is read: the largest tokenizer.json in use has some 40 MB."""
_CODE_KEYS = re.compile(
    r"auto_map|trust_remote_code|.*_implementation.*|custom_(?:generate|pipelines|code)|(?:use_)?(?:hub_)?kernels?(?:_config)?"
)
_PRIVATE_KEYS = {"__float__", "_name_or_path", "_commit_hash", "_remove_final_layer_norm", "_sliding_window_pattern"}
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:@\S+|:\S+)?")


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


def check_runs_no_code(config: Mapping[str, Any]) -> None:
    """Raises ModelNotServable for keys by which a configuration has made, or could make, transformers fetch and run code: named
    ones, private ones (CVE-2026-4372 was `_attn_implementation_internal`) and any value that has the form of a repository."""
    for key, value in _walk(config):
        if _CODE_KEYS.fullmatch(key.lower()) or (key.startswith("_") and key not in _PRIVATE_KEYS):
            raise ModelNotServable(f"config.json: {key!r:.80} can make the loader run other code; remove it")
        if isinstance(value, str) and key != "_name_or_path" and _REPOSITORY.fullmatch(value):
            raise ModelNotServable(
                f"config.json: {key!r:.80} names the repository {value!r:.80}, and nothing is fetched; remove it"
            )


def _walk(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key with its value at any depth; a list's items bear the list's key."""
    pending: list[tuple[str, Any]] = list(config.items())
    while pending:
        key, value = pending.pop()
        yield key, value
        if isinstance(value, dict):
            pending.extend(value.items())
        elif isinstance(value, list):
            pending.extend((key, item) for item in value)


def positive(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """The first of `names` that is set, as a positive integer. Raises ModelNotServable without one."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
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


def rope_types(config: Mapping[str, Any]) -> set[str]:
    """How rotary embeddings are scaled, over all kinds of layers; empty where config.json doesn't say."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    found = {str(one.get("rope_type", one.get("type"))) for one in nested}
    return found - {"None"}
