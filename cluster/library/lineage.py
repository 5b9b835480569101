"""Where a model came from, as the tags of its version: enough to make it again or to say why that is not possible."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
from importlib import metadata
from pathlib import Path


def code_version(*packages: str) -> str:
    """A digest of the packages' Python sources: the version of the code that ran, with or without a git checkout around it."""
    digest = hashlib.sha256()
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"{package} is not an importable package")
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def lineage(*, dataset_sha256: str, dataset: str, licence: str, run_id: str, base_model: str, code: str) -> dict[str, str]:
    """Tags for `Registry.register`. `base_model` is `none` for a model that starts from random weights."""
    return {
        "dataset": dataset,
        "dataset_sha256": dataset_sha256,
        "licence": licence,
        "run_id": run_id,
        "base_model": base_model,
        "code_version": code,
        "format": "safetensors",
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in ("torch", "transformers", "deepspeed", "ray")},
    }
