"""The parts as the platform puts them together, over its own store and home."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from cluster.settings import Settings
from cluster.store import Store
from cluster.tenancy.audit import read_head
from cluster.tenancy.chain import Actor
from cluster.tenancy.consents import Consent
from deployments.gateway.chores import Chores, do
from deployments.gateway.tenancy import Tenancy
from tests.cluster.conftest import postgres_url  # noqa: F401 - a fixture
from tests.deployments.gateway.conftest import serving
from tests.fakes import KeyRing

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "one two"}]}


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_everything_works_together_and_leaves_a_true_log(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    settings = Settings(home=tmp_path, database_url=request.getfixturevalue("postgres_url") if kind == "postgres" else None)
    store = Store(settings.store_url)
    store.migrate()
    tenancy = Tenancy.of(store, settings)
    assert tenancy.audit is not None
    assert tenancy.accounts is not None
    tenancy.accounts.by(Actor("system", "test")).consents.put(Consent("acme", 1))
    chores = Chores(tenancy.chores)
    for chore in tenancy.chores:
        do(chore)
    with serving(tenancy=tenancy, verify=KeyRing().verify) as server, server.http() as http, server.http("wrong") as stranger:
        first, again = (http.post("/v1/chat/completions", json=CHAT, headers={"Idempotency-Key": "k"}) for _ in range(2))
        assert first.content == again.content
        assert again.headers["idempotent-replayed"] == "true"
        assert stranger.get("/v1/models").status_code == 401
    chores.close()
    for chore in tenancy.chores:
        do(chore)
    verdict = tenancy.audit.verify()
    assert verdict.problems == ()
    assert [record.action for record in tenancy.audit.records()] == ["project.updated", "login.failed"]
    assert read_head(tmp_path / "audit" / "head.json") == verdict.head
    assert len(list((tmp_path / "kept" / "acme").rglob("*.parquet"))) == 1, "the replayed answer was kept when it was made"
    assert stat.S_IMODE((tmp_path / "secrets" / "audit-key").stat().st_mode) == 0o600
    store.downgrade("base")
    store.close()
