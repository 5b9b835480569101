"""The weight files of a model directory: which there are, and whether they are whole. Reads headers only, never unpickles."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ModelNotServable
from deployments.engine.model_config import read_json
from deployments.engine.safetensors_header import TensorEntry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHT_TYPES = {"F64", "F32", "F16", "BF16"}
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_BUFFER_TYPES = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}


@dataclass(frozen=True, slots=True)
class Weights:
    """What the files hold: every tensor by name, and the file that it is in."""

    tensors: dict[str, TensorEntry]
    files: dict[str, Path]

    @property
    def num_parameters(self) -> int:
        return sum(entry.num_elements for entry in self.tensors.values() if entry.dtype in _WEIGHT_TYPES)


def find_weights(directory: Path) -> Weights:
    """Raises ModelNotServable for missing, damaged, quantised or pickled weights."""
    placed = _placed(directory)
    tensors: dict[str, TensorEntry] = {}
    files: dict[str, Path] = {}
    for file, named in placed.items():
        header = read_header(directory / file)
        if missing := sorted(named - header.keys()):
            raise ModelNotServable(f"{INDEX} places {missing[0]!r:.100} in {file}, which doesn't hold it; download the model again")
        wanted = named or header.keys()
        tensors |= {name: header[name] for name in wanted}
        files |= dict.fromkeys(wanted, directory / file)
    _check_types(tensors)
    return Weights(tensors, files)


def fingerprint(directory: Path, weights: Weights) -> str:
    """A digest that changes when the weights do, without reading them all: of config.json, and of each weight file its name, size,
    time, header and some blocks that lie spread over it. What keeps size and time and misses every block stays unseen."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(set(weights.files.values())):
        found = path.stat()
        digest.update(f"\0{path.name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(8 + int.from_bytes(file.read(8), "little")))
            for block in range(_SAMPLES):
                file.seek(found.st_size * block // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _placed(directory: Path) -> dict[str, set[str]]:
    """File names with the tensors that the index looks for in each; no index: one file, all of it."""
    index = read_json(directory / INDEX)
    if index:
        return _from_index(directory, index.get("weight_map"))
    if (directory / SINGLE).is_file():
        return {SINGLE: set()}
    raise ModelNotServable(f"{directory.name} has no {SINGLE}{_why_not(directory)}")


def _from_index(directory: Path, weight_map: object) -> dict[str, set[str]]:
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelNotServable(f"{INDEX} has no weight_map")
    placed: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise ModelNotServable(f"{INDEX} names {file!r:.100}, which is no file name of safetensors in this directory")
        placed.setdefault(file, set()).add(tensor)
    if missing := sorted(file for file in placed if not (directory / file).is_file()):
        raise ModelNotServable(f"{INDEX} names {', '.join(missing)}, which {_is(missing)} missing; download the model again")
    return placed


def _is(things: list[str]) -> str:
    return "is" if len(things) == 1 else "are"


def _why_not(directory: Path) -> str:
    """What is there instead, and what to do about it."""
    names = sorted(entry.name for entry in directory.iterdir())
    if "adapter_model.safetensors" in names:
        return ", only a LoRA adapter; merge it into its base model first"
    if any(name.endswith(".safetensors") for name in names):
        return f" and no {INDEX} for its shards; save the model again with save_pretrained(...)"
    if any(name.endswith(_PICKLES) for name in names):
        return "; pickled weights can run code and are never loaded: save the model again with safe_serialization=True"
    if any(name.endswith(".gguf") for name in names):
        return "; GGUF files are not supported: take the model's safetensors"
    return "; the weights are missing"


def _check_types(tensors: dict[str, TensorEntry]) -> None:
    for name, entry in tensors.items():
        if entry.dtype not in _WEIGHT_TYPES | _BUFFER_TYPES:
            raise ModelNotServable(f"tensor {name!r:.100} is quantised ({entry.dtype}); use the model's 16 or 32 bit weights")
    if not any(entry.dtype in _WEIGHT_TYPES for entry in tensors.values()):
        raise ModelNotServable("the weight files hold no floating-point tensor")
