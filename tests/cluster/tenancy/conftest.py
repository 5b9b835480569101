"""A clock, and the store on both databases, for tests of what tenants may and did."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.store import Store


class Clock:
    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def migrated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    is_sqlite = request.param == "sqlite"
    url = f"sqlite:///{tmp_path_factory.mktemp('db')}/mmaas.db" if is_sqlite else request.getfixturevalue("postgres_url")
    store = Store(url)
    store.migrate()
    yield store
    store.downgrade("base")
    store.close()
