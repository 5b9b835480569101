"""cluster.yaml and the cloud variant of docs/cluster.md are what Ray's own launcher accepts, with the token on everywhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def own() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def cloud() -> dict[str, Any]:
    match = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    assert match
    loaded: dict[str, Any] = yaml.safe_load(match[1])
    return loaded


@pytest.mark.parametrize("read", [own, cloud])
def test_ray_accepts_it(read: Any) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(read()))


@pytest.mark.parametrize("read", [own, cloud])
def test_ray_starts_only_with_the_nodes_environment(read: Any) -> None:
    config = read()
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all(command.startswith(". ~/.mmaas/node.sh && ") for command in starts)


def test_the_nodes_environment_turns_the_token_on() -> None:
    script = "\n".join(own()["setup_commands"])
    assert "RAY_AUTH_MODE=token" in script
    assert "RAY_AUTH_TOKEN_PATH=" in script
    assert "chmod 600" in script


def test_the_cloud_has_a_group_with_and_one_without_gpu() -> None:
    kinds = cloud()["available_node_types"]
    assert {"cpu", "gpu"} <= kinds.keys()
    assert cloud()["head_node_type"] in kinds
