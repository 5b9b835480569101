"""A whole platform in a private home on private ports, driven as a person drives it: by the `mmaas` command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from cluster import launch
from cluster.settings import Settings, load
from tests.free_ports import free_ports, free_run

ROOT = Path(__file__).parents[2]
MODEL = "tiny"


def private_environment(home: Path) -> dict[str, str]:
    """Settings of a platform beside which another may run."""
    names = ("RAY__GCS_PORT", "RAY__DASHBOARD_PORT", "RAY__CLIENT_PORT", "MLFLOW__PORT", "GATEWAY__PORT")
    ports = {f"MMAAS_{name}": str(port) for name, port in zip(names, free_ports(len(names)), strict=True)}
    ports["MMAAS_GATEWAY__INTERNAL_PORT"] = str(free_run())
    return ports | {
        "MMAAS_HOME": str(home),
        "MMAAS_RAY__NUM_CPUS": "2",
        "MMAAS_ENGINE__SHARED_MEMORY": "false",
        "MMAAS_ENGINE__KV_CACHE_BYTES": str(1 << 22),
        "MMAAS_ENGINE__BLOCK_SIZE": "4",
        "MMAAS_ENGINE__MAX_SEQUENCES": "32",
        "MMAAS_ENGINE__MAX_QUEUED": "16",
        "MMAAS_ENGINE__STEP_DEADLINE_S": "10",
    }


@dataclass
class RunningPlatform:
    environment: dict[str, str]
    settings: Settings = field(init=False)

    def __post_init__(self) -> None:
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            self.settings = load()
        finally:
            os.environ.clear()
            os.environ.update(before)

    def mmaas(self, *words: str, check: bool = True, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "mmaas", *words, check=check, timeout=timeout)

    def run(self, *words: str, check: bool = True, timeout: float = 240, **extra: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | self.environment | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | extra
        result = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        assert not check or result.returncode == 0, f"{words} said:\n{result.stdout}\n{result.stderr}"
        return result

    @property
    def quickstart(self) -> dict[str, str]:
        return json.loads((self.settings.home / "quickstart.json").read_text())

    def client(self, **options: Any) -> openai.OpenAI:
        found = self.quickstart
        options = {"max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=found["base_url"], api_key=found["api_key"], _strict_response_validation=True, **options)

    def counters(self, model: str = MODEL, prefix: str = "mmaas_engine_") -> dict[str, float]:
        """A model's own counters, as the gateway shows them to an administrator."""
        address = self.quickstart["base_url"].removesuffix("/v1") + "/metrics"
        answer = httpx.get(address, headers={"Authorization": f"Bearer {self.quickstart['admin_key']}"}, trust_env=False)
        assert answer.status_code == 200, answer.text
        lines = [line for line in answer.text.splitlines() if line.startswith(prefix) and f'model="{model}"' in line]
        return {line.partition("{")[0].removeprefix(prefix): float(line.split()[-1]) for line in lines}

    def shards(self) -> list[psutil.Process]:
        """The ranks' processes."""
        return [process for process in launch.family(self.settings) if "ShardActor" in " ".join(process.cmdline())]
