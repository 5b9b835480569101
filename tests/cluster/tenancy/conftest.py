"""Accounts over an empty store with a clock that is set by hand: on SQLite and on Postgres."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.store import Store, metadata
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.projects import DEFAULT, organizations, projects


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def migrated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    is_sqlite = request.param == "sqlite"
    directory = tmp_path_factory.mktemp("tenancy")
    store = Store(f"sqlite:///{directory}/mmaas.db" if is_sqlite else request.getfixturevalue("postgres_url"))
    store.migrate()
    yield store
    store.downgrade("base")
    store.close()


@pytest.fixture
def store(migrated: Store) -> Store:
    """With the default organization and project, and nothing else."""
    default = {"id": DEFAULT, "name": DEFAULT, "created_at": 1.0}
    with migrated.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())
        connection.execute(organizations.insert().values(default))
        connection.execute(projects.insert().values(**default, organization_id=DEFAULT))
    return migrated


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def accounts(store: Store, clock: Clock) -> Accounts:
    return Accounts(store, b"pepper", clock)
