"""Accounts and a ledger over an empty store, on SQLite and on Postgres, and a clock that tests move."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.store import Store, metadata
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.ledger import Ledger
from cluster.tenancy.projects import DEFAULT, organizations, projects

KEPT = ("postings", "entries", "usage_records", "price_versions", "plan_changes", "grants", "invoices", "audit_")
"""Tables, by how they begin, from which the database lets nobody take anything; tests that fill them have a store of their own
(`either_store`)."""


class Clock:
    """Seconds since the epoch; begins on 2026-11-23 at noon, UTC."""

    def __init__(self, now: float = 1_795_435_200.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


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
            if not table.name.startswith(KEPT):
                connection.execute(table.delete())
        connection.execute(organizations.insert().values(default))
        connection.execute(projects.insert().values(**default, organization_id=DEFAULT))
    return migrated


@pytest.fixture
def accounts(store: Store, clock: Clock) -> Accounts:
    return Accounts(store, b"pepper", clock)


@pytest.fixture(params=["sqlite", "postgres"])
def either_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store of this test alone: what a ledger holds can't be deleted."""
    is_sqlite = request.param == "sqlite"
    store = Store(f"sqlite:///{tmp_path}/mmaas.db" if is_sqlite else request.getfixturevalue("postgres_url"))
    store.migrate()
    yield store
    store.downgrade("base")
    store.close()


@pytest.fixture
def ledger(either_store: Store, clock: Clock) -> Ledger:
    return Ledger(either_store, clock, monotonic=clock)
