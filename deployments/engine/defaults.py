"""How a model itself wants to be sampled: `generation_config.json`, for what a caller leaves open."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from deployments.engine.model_config import read_json

BOUNDS = {"temperature": (0.0, 2.0), "top_p": (0.01, 1.0), "top_k": (0, 1 << 20), "repetition_penalty": (0.1, 2.0)}


def sampling_defaults(directory: Path) -> dict[str, Any]:
    """Fields of `Sampling` with a model's own defaults. `do_sample: false` means greedy; nonsense is left out."""
    config = read_json(directory / "generation_config.json")
    if config.get("do_sample") is False:
        return {"temperature": 0.0}
    return {name: config[name] for name, (least, most) in BOUNDS.items() if _is_number(config.get(name), least, most)}


def _is_number(value: Any, least: float, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and least <= value <= most
