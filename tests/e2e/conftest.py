"""One platform for all end-to-end tests: it takes half a minute to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deployments.engine.families import build
from tests.e2e.platform import MODEL, RunningPlatform, private_environment


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPlatform]:
    root = tmp_path_factory.mktemp("platform")
    directory = build("llama", root / "model")
    running = RunningPlatform(private_environment(root / "home"))
    try:
        running.mmaas("up", "--model", str(directory), "--name", MODEL, "--tp", "2", timeout=280)
        yield running
    finally:
        running.mmaas("down")
