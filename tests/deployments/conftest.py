"""What tests of the engine, of encoders and of tabular models share."""

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


@pytest.fixture(scope="session")
def iris(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier as MLflow saves it: a table in, names and probabilities out."""
    from tests.deployments.predict import tables

    return tables.saved(tables.irises(), tables.FLOWERS, tmp_path_factory.mktemp("iris") / "model")


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of named columns."""
    from tests.deployments.predict import tables

    return tables.saved(tables.people(), tables.PEOPLE, tmp_path_factory.mktemp("people") / "model")


@pytest.fixture(scope="session")
def forest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of trees."""
    from tests.deployments.predict import tables

    return tables.saved(
        tables.forest(), tables.FLOWERS, tmp_path_factory.mktemp("forest") / "model", trusted=["sklearn.tree._tree.Tree"]
    )
