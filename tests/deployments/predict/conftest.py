"""Tabular models that several tests use, saved once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deployments.predict import tables


@pytest.fixture(scope="session")
def iris(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tables.saved(tables.irises(), tables.FLOWERS, tmp_path_factory.mktemp("iris") / "model")


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tables.saved(tables.people(), tables.PEOPLE, tmp_path_factory.mktemp("people") / "model")


@pytest.fixture(scope="session")
def forest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tables.saved(
        tables.forest(), tables.FLOWERS, tmp_path_factory.mktemp("forest") / "model", trusted=["sklearn.tree._tree.Tree"]
    )
