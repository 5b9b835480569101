"""Admission of a LoRA adapter's files in PEFT's format: what they hold, or why they can't be used. Light: reads JSON and a header.

Two files count, by fixed names: adapter_config.json and adapter_model.safetensors. Nothing in them is taken for a path, a pattern
or code. What would change what the numbers mean is refused by name; keys that are unknown here pass only when they are off. Whether
the numbers are finite is known where they are read (`adapters.py`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ModelNotServable
from deployments.engine.model_config import read_json
from deployments.engine.safetensors_header import TensorEntry, read_header
from deployments.engine.weights import find_weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 256
MAX_CONFIG_BYTES = 1 << 20
TARGETS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")

_MODULE = rf"model\.layers\.\d{{1,4}}\.(?:self_attn|mlp)\.(?:{'|'.join(TARGETS)})"
_BASE = re.compile(rf"({_MODULE})\.weight")
_PART = re.compile(rf"base_model\.model\.({_MODULE})\.lora_([AB])\.weight")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_INITIAL = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin a training that leave the base model's weights as they are."""
_TELLING = {
    *("r", "lora_alpha", "use_rslora", "target_modules", "peft_type", "bias", "init_lora_weights"),  # read below
    *("auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type"),  # says where it comes from
    *("eva_config", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout"),  # of training
    *("megatron_core", "qalora_group_size", "runtime_config"),  # nothing without another switch
}

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter that fits its base. `modules`: the base's linears that it changes, by name, each with its whole weight's shape."""

    path: Path
    rank: int
    scale: float
    modules: Mapping[str, Shape]
    tensors: Mapping[str, TensorEntry]

    @property
    def num_parameters(self) -> int:
        return sum(self.rank * sum(shape) for shape in self.modules.values())

    def names(self, module: str) -> tuple[str, str]:
        """Of its two tensors: `rank x inputs`, and `outputs x rank`."""
        prefix = f"base_model.model.{module}"
        return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def base_shapes(directory: Path) -> dict[str, Shape]:
    """The linears of a base model that adapters can change. Raises ModelNotServable for a directory without whole weights."""
    found = {_BASE.fullmatch(name): entry.shape for name, entry in find_weights(directory).tensors.items()}
    return {match[1]: shape for match, shape in found.items() if match and len(shape) == 2}


def content_digest(directory: Path) -> bytes:
    """Of both files."""
    digests = []
    for name in (CONFIG, WEIGHTS):
        with (directory / name).open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").digest())
    return hashlib.sha256(b"".join(digests)).digest()


def inspect(directory: Path, base: Mapping[str, Shape]) -> AdapterFiles:
    """Raises ModelNotServable, with what is wrong, for files that aren't an adapter of this base."""
    path = directory / WEIGHTS
    rank, scale = _settings(_config(directory))
    if not base:
        raise _refusal("the base has no linears of the names that adapters change here (model.layers.N.self_attn.q_proj, ...)")
    if not path.is_file():
        pickled = (directory / "adapter_model.bin").exists()
        why = "; pickled weights can run code and are never loaded: save it again with safe_serialization=True" if pickled else ""
        raise _refusal(f"there is no {WEIGHTS}{why}")
    tensors = read_header(path)
    modules = {module: base[module] for module in _changed(tensors, base)}
    files = AdapterFiles(path, rank, scale, modules, tensors)
    for module, shape in modules.items():
        _check_shapes(files, module, shape)
    return files


def _config(directory: Path) -> Mapping[str, Any]:
    path = directory / CONFIG
    if path.is_file() and path.stat().st_size > MAX_CONFIG_BYTES:
        raise _refusal(f"{CONFIG} has more than {MAX_CONFIG_BYTES >> 20} MiB")
    config = read_json(path)
    if not config:
        raise _refusal(f"there is no {CONFIG}; an adapter in PEFT's format is needed")
    return config


def _settings(config: Mapping[str, Any]) -> tuple[int, float]:
    """Rank and scale."""
    if config.get("peft_type") != "LORA":
        raise _refusal(f"peft_type is {config.get('peft_type')!r:.40}; only LORA is served")
    if config.get("bias", "none") != "none":
        raise _refusal(f"bias={config['bias']!r:.40} changes biases of the base; train with bias='none', or merge the adapter")
    if (begun := config.get("init_lora_weights", True)) not in _INITIAL:
        raise _refusal(
            f"init_lora_weights={begun!r:.40} changes the base itself; convert the adapter when you save it, or merge it"
        )
    if odd := sorted(key for key, value in config.items() if key not in _TELLING and value not in (None, False, "", [], {})):
        raise _refusal(f"{odd[0]!r:.60} is not supported; merge the adapter into its base, or train without it")
    _check_targets(config.get("target_modules"))
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    if not _is_number(rank, int) or not 1 <= rank <= MAX_RANK:
        raise _refusal(f"r must be an integer from 1 to {MAX_RANK}, not {rank!r:.40}")
    if not _is_number(alpha, (int, float)) or not 0 < alpha < 1e6:
        raise _refusal(f"lora_alpha must be a number above 0 and below a million, not {alpha!r:.40}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_targets(targets: Any) -> None:
    """What the configuration says must be what we know; which modules it is, the tensors say. A pattern is not evaluated."""
    if targets is None or isinstance(targets, str):
        return
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise _refusal("target_modules must be a list of names")
    if unknown := sorted(target for target in targets if target.rpartition(".")[2] not in TARGETS):
        raise _refusal(f"target_modules names {unknown[0]!r:.60}; adapters may change {', '.join(TARGETS)}")


def _changed(tensors: Mapping[str, TensorEntry], base: Mapping[str, Shape]) -> list[str]:
    """The changed linears, each with both of its tensors."""
    parts: dict[str, set[str]] = {}
    for name in tensors:
        match = _PART.fullmatch(name)
        if match is None:
            raise _refusal(f"the tensor {name!r:.120} is no lora_A or lora_B of a linear that adapters may change")
        if match[1] not in base:
            raise _refusal(f"the base has no {match[1]}; the adapter belongs to another model")
        parts.setdefault(match[1], set()).add(match[2])
    if halves := sorted(module for module, found in parts.items() if len(found) < 2):
        raise _refusal(f"{halves[0]} has only one of lora_A and lora_B")
    if not parts:
        raise _refusal("it holds no tensor")
    return list(parts)


def _check_shapes(files: AdapterFiles, module: str, shape: Shape) -> None:
    outputs, inputs = shape
    for name, wanted in zip(files.names(module), ((files.rank, inputs), (outputs, files.rank)), strict=True):
        entry = files.tensors[name]
        if entry.shape != wanted:
            raise _refusal(f"{name} has the shape {entry.shape!r:.60}, not {wanted}")
        if entry.dtype not in _FLOATS:
            raise _refusal(f"{name} has the type {entry.dtype}; adapters are floating-point numbers")


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def _refusal(message: str) -> ModelNotServable:
    return ModelNotServable(f"the adapter can't be used: {message}")
