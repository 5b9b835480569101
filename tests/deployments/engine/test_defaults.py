"""A model's own wishes for sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deployments.engine.defaults import sampling_defaults


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}, {"temperature": 0.6, "top_p": 0.95, "top_k": 20}),
        ({"temperature": "hot", "top_p": 7, "top_k": True, "repetition_penalty": None}, {}),
        ({}, {}),
    ],
)
def test_model_says_how_it_wants_to_be_sampled(tmp_path: Path, config: dict[str, Any], expected: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert sampling_defaults(tmp_path) == expected


def test_model_without_wishes_has_none(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == {}
