"""What tests of the engine and of encoders share."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.engine.native import build


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the tests' own, with the compiled parts in it."""
    directory = tmp_path_factory.mktemp("cache")
    try:
        build.library(directory)
    except build.NativeUnavailable as error:
        pytest.skip(str(error))
    return directory
