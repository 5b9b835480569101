"""The parts as the platform puts them together, over its own store and home."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from cluster.settings import Settings
from cluster.store import Store
from cluster.tenancy.audit import read_head
from cluster.tenancy.chain import Actor
from cluster.tenancy.consents import Consent, Consents
from deployments.gateway.accounts import Accounts
from deployments.gateway.chores import Chores, do
from tests.cluster.conftest import postgres_url  # noqa: F401 - a fixture
from tests.deployments.gateway.conftest import serving

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "one two"}]}


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_everything_works_together_and_leaves_a_true_log(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    settings = Settings(home=tmp_path, database_url=request.getfixturevalue("postgres_url") if kind == "postgres" else None)
    store = Store(settings.store_url)
    store.migrate()
    accounts = Accounts.of(store, settings)
    assert accounts.audit is not None
    Consents(store, accounts.audit, frozenset({"keys"})).put(Actor("system", "test"), Consent("acme", 1))
    chores = Chores(accounts.chores)
    for chore in accounts.chores:
        do(chore)
    with serving(accounts=accounts) as server, server.http() as http, server.http("wrong") as stranger:
        first, again = (http.post("/v1/chat/completions", json=CHAT, headers={"Idempotency-Key": "k"}) for _ in range(2))
        assert first.content == again.content
        assert again.headers["idempotent-replayed"] == "true"
        assert stranger.get("/v1/models").status_code == 401
    chores.close()
    for chore in accounts.chores:
        do(chore)
    verdict = accounts.audit.verify()
    assert verdict.problems == ()
    assert [record.action for record in accounts.audit.records()] == ["project.updated", "login.failed"]
    assert read_head(tmp_path / "audit" / "head.json") == verdict.head
    assert len(list((tmp_path / "kept" / "acme").rglob("*.parquet"))) == 1, "the replayed answer was kept when it was made"
    assert stat.S_IMODE((tmp_path / "secrets" / "audit-key").stat().st_mode) == 0o600
    store.downgrade("base")
    store.close()
