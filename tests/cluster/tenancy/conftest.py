"""A store with the whole schema, on SQLite and on Postgres, and a clock that tests move."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.store import Store
from cluster.tenancy.ledger import Ledger


class Clock:
    """Seconds since the epoch; begins on 2026-11-23 at noon, UTC."""

    def __init__(self, now: float = 1_795_435_200.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgres"])
def either_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    sqlite = request.param == "sqlite"
    store = Store(f"sqlite:///{tmp_path}/mmaas.db" if sqlite else request.getfixturevalue("postgres_url"))
    store.migrate()
    yield store
    store.downgrade("base")
    store.close()


@pytest.fixture
def ledger(either_store: Store, clock: Clock) -> Ledger:
    return Ledger(either_store, clock, monotonic=clock)
