"""Revision 0008 up and down, with data, on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from cluster.store import Store, deployments
from cluster.tenancy.audit import Audit
from cluster.tenancy.chain import Actor
from cluster.tenancy.consents import Consent, Consents
from cluster.tenancy.idempotency import Answer, Idempotency, Replay, Run

TABLES = {"audit_log", "audit_head", "audit_checkpoints", "idempotency", "idempotency_totals", "consents"}
DEPLOYMENT = {
    "name": "a",
    "model": "models:/a@b",
    "tp": 1,
    "dtype": "float32",
    "min_replicas": 1,
    "max_replicas": 1,
    "created_at": 1.0,
}
SOMEBODY = Actor("system", "test")
ANSWER = Answer(200, (("content-type", "text/plain"),), b"x")


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    sqlite = request.param == "sqlite"
    store = Store(f"sqlite:///{tmp_path}/mmaas.db" if sqlite else request.getfixturevalue("postgres_url"))
    yield store
    store.downgrade("base")
    store.close()


def tables(store: Store) -> set[str]:
    with store.read() as connection:
        return set(sa.inspect(connection).get_table_names())


def fill(store: Store) -> None:
    audit, keys = Audit(store, bytes(32)), Idempotency(store)
    audit.record(SOMEBODY, "project.created", "p")
    Consents(store, note=audit.by(SOMEBODY)).put(Consent("acme", 1, redaction=None))
    run = keys.begin("acme", "k", bytes(32))
    assert isinstance(run, Run)
    keys.finish(run, ANSWER)
    assert keys.begin("acme", "k", bytes(32)) == Replay(ANSWER)
    assert audit.verify().problems == ()
    assert audit.verify().records == 2


def test_up_and_down_and_up_again_with_data(store: Store) -> None:
    store.migrate("0004")
    with store.begin() as connection:
        connection.execute(deployments.insert().values(DEPLOYMENT))
    for _ in range(2):
        store.migrate("0008")
        assert tables(store) >= TABLES
        fill(store)
        store.downgrade("0004")
        assert not tables(store) & TABLES
    with store.read() as connection:
        assert connection.scalar(sa.select(deployments.c.model)) == DEPLOYMENT["model"]
