"""Whether a model directory can take another's place in a running group: same shape, same tokens, other numbers. Reads JSON and
headers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.errors import Conflict
from deployments.engine.checkpoint import ModelInfo, inspect
from deployments.engine.model_config import read_json
from deployments.engine.weights import find_weights

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
"""Files that the replica has read once, and doesn't read again."""
_UNIMPORTANT = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})
"""Of config.json: says where the model is from, or what is decided otherwise."""


def require(old: Path, new: Path, model: ModelInfo, tp: int, pp: int = 1) -> None:
    """`model`: what `old` is served as. Raises Conflict that names what differs; ModelNotServable for what nobody could serve."""
    if different := differences(old, new, model, tp, pp):
        raise Conflict(f"{new.name} can't take the place of {old.name} in a running group: {different[0]} differs")


def differences(old: Path, new: Path, model: ModelInfo, tp: int, pp: int = 1) -> list[str]:
    """What isn't the same, in words. Raises ModelNotServable for a directory that can't be served at all."""
    found = inspect(new, tp=tp, pp=pp, dtype=model.dtype, max_model_len=model.max_model_len, quantization=model.quantization)
    configs = [_config(directory) for directory in (old, new)]
    keys = sorted(configs[0].keys() | configs[1].keys())
    different = [f"{key} of config.json" for key in keys if configs[0].get(key) != configs[1].get(key)]
    different += [name for name in TOKENIZER if _content(old / name) != _content(new / name)]
    shapes = [{name: entry.shape for name, entry in find_weights(directory).tensors.items()} for directory in (old, new)]
    different += [
        f"the shape of {name}" for name in sorted(shapes[0].keys() | shapes[1].keys()) if shapes[0].get(name) != shapes[1].get(name)
    ]
    if found != model and not different:
        different.append("the model's shape")
    return different


def _config(directory: Path) -> dict[str, Any]:
    return {key: value for key, value in read_json(directory / "config.json").items() if key not in _UNIMPORTANT}


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
