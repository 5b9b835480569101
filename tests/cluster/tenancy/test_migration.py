"""Keys from before there were projects, up and down again."""

from __future__ import annotations

import hashlib
import hmac
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from cluster.errors import Unauthenticated
from cluster.store import Store
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.projects import DEFAULT

PEPPER = b"pepper"
SECRET = "ab" * 32
OLD = sa.table("api_keys", *map(sa.column, ("id", "tenant", "name", "digest", "scopes", "created_at", "expires_at", "revoked_at")))


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    sqlite = request.param == "sqlite"
    store = Store(f"sqlite:///{tmp_path}/mmaas.db" if sqlite else request.getfixturevalue("postgres_url"))
    store.migrate("0004")
    yield store
    store.downgrade("base")
    store.close()


def text(key_id: str) -> str:
    body = f"mk_{key_id}{SECRET}"
    return f"{body}{zlib.crc32(body.encode()):08x}"


def row(number: int, tenant: str, scopes: str, revoked_at: float | None = None) -> dict[str, object]:
    digest = hmac.digest(PEPPER, bytes.fromhex(SECRET), hashlib.sha256)
    own = {"id": f"{number:012x}", "tenant": tenant, "scopes": scopes, "revoked_at": revoked_at}
    return {**own, "name": f"key {number}", "digest": digest, "created_at": float(number), "expires_at": None}


def test_old_keys_work_on_in_projects_that_keep_their_tenants_apart(store: Store) -> None:
    rows = [
        row(1, DEFAULT, "inference"),
        row(2, "acme", "inference"),
        row(3, "acme", "admin inference"),
        row(4, "acme", "inference", 9.0),
    ]
    with store.begin() as connection:
        connection.execute(OLD.insert(), rows)
    store.migrate("0005")
    accounts = Accounts(store, PEPPER)
    assert {project.id for project in accounts.projects.list(DEFAULT).items} == {DEFAULT, "acme"}
    first, second, third = (accounts.keys.verify(text(f"{number:012x}")) for number in (1, 2, 3))
    assert (first.tenant, first.organization, first.scopes) == (DEFAULT, DEFAULT, {"inference"})
    assert (second.tenant, second.scopes) == ("acme", {"inference"})
    assert third.tenant == ""
    assert third.can("admin")
    assert not third.can("inference")
    with pytest.raises(Unauthenticated, match="revoked"):
        accounts.keys.verify(text(f"{4:012x}"))
    assert accounts.keys.list("acme")[0].owner.name == "key 2"  # type: ignore[union-attr]


def test_down_again_nothing_is_less_bound_than_before(store: Store) -> None:
    with store.begin() as connection:
        connection.execute(OLD.insert(), [row(1, "acme", "inference"), row(2, "acme", "admin")])
    store.migrate("0005")
    accounts = Accounts(store, PEPPER)
    keys = accounts.keys
    keys.create(DEFAULT, "for one model", models=["m"])
    keys.create_admin(DEFAULT, "not for the platform")
    archived = accounts.projects.create(DEFAULT, "soon archived").id
    ended, _ = keys.create(archived, "ends")
    accounts.projects.archive(DEFAULT, archived)
    deleted, _ = keys.create(DEFAULT, "ends, too")
    found = keys.get(DEFAULT, DEFAULT, deleted)
    assert found.owner
    accounts.service_accounts.delete(DEFAULT, DEFAULT, found.owner.id)
    store.downgrade("0004")
    with store.read() as connection:
        left = {key.id: (key.tenant, key.scopes, key.revoked_at is not None) for key in connection.execute(sa.select(OLD))}
    assert left == {
        f"{1:012x}": ("acme", "inference", False),
        f"{2:012x}": (DEFAULT, "admin", False),
        ended: (archived, "inference", True),
        deleted: (DEFAULT, "inference", True),
    }
    store.migrate("0005")
    assert keys.verify(text(f"{1:012x}")).tenant == "acme"
