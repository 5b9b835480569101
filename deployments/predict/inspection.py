"""Admission of a tabular model's directory: what MLflow and skops left in it, or why it can't be served.

Light: reads YAML and JSON, before any process starts; neither MLflow nor scikit-learn is imported. The directory is what
`mlflow.sklearn.save_model(..., serialization_format="skops", signature=...)` writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ModelNotServable
from cluster.types import TensorSpec
from deployments.predict import skops_file

PLATFORM = "sklearn_skops"
"""Framework and format, as the protocol names platforms."""

DEFAULT_INPUT = "input-0"
"""The name of an input that the signature gives none."""

MAX_YAML_BYTES = 4 << 20

_COLUMNS = {
    "boolean": "BOOL",
    "integer": "INT32",
    "long": "INT64",
    "float": "FP32",
    "double": "FP64",
    "string": "BYTES",
}
"""MLflow's types of columns."""
_ARRAYS = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "str": "BYTES",
}
"""NumPy's types, as MLflow names them."""


@dataclass(frozen=True, slots=True)
class PredictorInfo:
    """A tabular model that can be served."""

    inputs: tuple[TensorSpec, ...]
    by_column: bool  # an input is a column of a table, not the table itself
    predicted: TensorSpec  # what `predict` gives
    file: str


def is_predictor(directory: Path) -> bool:
    return (directory / "MLmodel").is_file()


def inspect(directory: str | Path) -> PredictorInfo:
    """Raises ModelNotServable, with what to change, for a model that can't be served."""
    directory = Path(directory)
    described = _read_yaml(directory / "MLmodel")
    flavor = _mapping(described, "flavors", "sklearn")
    if flavor.get("serialization_format") != "skops":
        raise ModelNotServable(
            f"the model is saved as {str(flavor.get('serialization_format'))!r:.40}, which can run code when it is loaded; save it"
            ' with mlflow.sklearn.save_model(..., serialization_format="skops")'
        )
    if flavor.get("code") is not None:
        raise ModelNotServable("the model brings code of its own, which is never run; save it without code_paths")
    _check_version(str(flavor.get("sklearn_version")))
    file = flavor.get("pickled_model")
    if not isinstance(file, str) or Path(file).name != file:
        raise ModelNotServable(f"MLmodel names the file {str(file)!r:.80}, which is none of this directory")
    skops_file.check(directory / file)
    inputs, by_column = _inputs(_signature(described, "inputs"))
    return PredictorInfo(inputs, by_column, _predicted(_signature(described, "outputs")), file)


def _check_version(saved: str) -> None:
    """Another minor version of scikit-learn may load a model and compute something else."""
    here = metadata.version("scikit-learn")
    if saved.split(".")[:2] != here.split(".")[:2]:
        raise ModelNotServable(f"the model was saved by scikit-learn {saved:.20}; this is {here}: train it, or save it, with that")


def _signature(described: Mapping[str, Any], side: str) -> list[Mapping[str, Any]]:
    """MLflow keeps each side as JSON inside of the YAML."""
    try:
        specs = json.loads(_mapping(described, "signature")[side])
    except (KeyError, TypeError, ValueError, RecursionError):
        specs = None
    if not isinstance(specs, list) or not 0 < len(specs) <= 4096 or not all(isinstance(spec, dict) for spec in specs):
        raise ModelNotServable(f"MLmodel has no signature with {side}; save the model with signature=infer_signature(X, y)")
    return specs


def _inputs(specs: Sequence[Mapping[str, Any]]) -> tuple[tuple[TensorSpec, ...], bool]:
    if any(spec.get("type") == "tensor" for spec in specs):
        if len(specs) != 1:
            raise ModelNotServable("the signature has several tensors; scikit-learn takes one, or named columns")
        tensor = _tensor(specs[0], DEFAULT_INPUT)
        if len(tensor.shape) != 2 or tensor.shape[1] < 1:
            raise ModelNotServable(f"the signature's input has the shape {list(tensor.shape)}; a table has [-1, number of columns]")
        return (tensor,), False
    columns = tuple(_column(spec) for spec in specs)
    if len({column.name for column in columns}) != len(columns):
        raise ModelNotServable("two columns of the signature have the same name")
    return columns, True


def _predicted(specs: Sequence[Mapping[str, Any]]) -> TensorSpec:
    if len(specs) != 1:
        raise ModelNotServable("the signature has several outputs; what `predict` gives is one")
    if specs[0].get("type") == "tensor":
        return _tensor(specs[0], "predict", named="predict")
    return TensorSpec("predict", _datatype(_COLUMNS, specs[0].get("type")), (-1,))


def _tensor(spec: Mapping[str, Any], default: str, named: str | None = None) -> TensorSpec:
    facts = spec.get("tensor-spec")
    shape = facts.get("shape") if isinstance(facts, dict) else None
    if not isinstance(facts, dict) or not isinstance(shape, list) or not 1 <= len(shape) <= 8:
        raise ModelNotServable("the signature has a tensor without a shape")
    if shape[0] != -1 or not all(type(size) is int and size > 0 for size in shape[1:]):
        raise ModelNotServable(f"the signature has the shape {shape!r:.80}; the first size must be -1, all others known")
    return TensorSpec(named or _name(spec.get("name", default)), _datatype(_ARRAYS, facts.get("dtype")), tuple(shape))


def _column(spec: Mapping[str, Any]) -> TensorSpec:
    if spec.get("required") is False:
        raise ModelNotServable(
            f"the column {spec.get('name')!r:.80} is optional, which isn't supported: a caller sends all columns"
        )
    return TensorSpec(_name(spec.get("name")), _datatype(_COLUMNS, spec.get("type")), (-1,))


def _name(name: object) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= 256 or not name.isprintable():
        raise ModelNotServable(f"the signature has an input of the name {str(name)!r:.80}; give it one of 1 to 256 characters")
    return name


def _datatype(known: Mapping[str, str], name: object) -> str:
    if not isinstance(name, str) or name not in known:
        raise ModelNotServable(f"the signature has the type {str(name)!r:.40}; those that are served are {', '.join(known)}")
    return known[name]


def _mapping(tree: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    for key in path:
        found = tree.get(key)
        if not isinstance(found, dict):
            raise ModelNotServable(f"MLmodel has no {'.'.join(path)}: only models that mlflow.sklearn has saved are served")
        tree = found
    return tree


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ModelNotServable(f"{path.name} has more than {MAX_YAML_BYTES >> 20} MiB, which no such file needs")
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ModelNotServable(f"{path.name} can't be read as YAML: {type(error).__name__}") from None
    if not isinstance(tree, dict):
        raise ModelNotServable(f"{path.name} holds no mapping")
    return tree
