"""The adapters that callers may name, as rows of the store."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.adapters import Catalog
from cluster.errors import InvalidRequest, ModelNotFound
from cluster.store import Store
from cluster.types import Adapter

ADDRESS = "0123456789abcdef" * 4


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    store = Store(f"sqlite:///{tmp_path / 'test.db'}")
    store.migrate()
    return Catalog(store, clock=lambda: 5.0)


def test_a_name_stands_for_its_newest_files(catalog: Catalog) -> None:
    catalog.put(Adapter("chat", "german", ADDRESS))
    catalog.put(Adapter("chat", "french", ADDRESS))
    catalog.put(Adapter("chat", "german", ADDRESS[::-1]))
    found = catalog.list()
    assert [adapter.model for adapter in found] == ["chat:french", "chat:german"]
    assert (found[1].address, found[1].created_at) == (ADDRESS[::-1], 5.0)


def test_what_is_deleted_is_gone_and_only_that(catalog: Catalog) -> None:
    for base in ("chat", "code"):
        catalog.put(Adapter(base, "german", ADDRESS))
    catalog.delete("chat", "german")
    assert [adapter.model for adapter in catalog.list()] == ["code:german"]
    with pytest.raises(ModelNotFound, match="chat:german"):
        catalog.delete("chat", "german")


@pytest.mark.parametrize("name", ["", "A", "a:b", "../x", "a/b", "a" * 64, "a b", "é", "a\n"])
def test_a_name_that_could_be_something_else_is_refused(catalog: Catalog, name: str) -> None:
    for adapter in (Adapter("chat", name, ADDRESS), Adapter(name, "german", ADDRESS)):
        with pytest.raises(InvalidRequest):
            catalog.put(adapter)
    assert catalog.list() == []


@pytest.mark.parametrize("address", ["", "../../etc", ADDRESS[:-1], ADDRESS.upper()])
def test_an_address_that_is_none_is_refused(catalog: Catalog, address: str) -> None:
    with pytest.raises(InvalidRequest):
        catalog.put(Adapter("chat", "german", address))
