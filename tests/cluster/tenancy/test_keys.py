from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidRequest, NotFound, Unauthenticated
from cluster.store import Store, api_keys
from cluster.tenancy.keys import Keys


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('keys')}/mmaas.db")
    store.migrate()
    yield store
    store.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(store: Store, clock: Clock) -> Keys:
    with store.begin() as connection:
        connection.execute(api_keys.delete())
    return Keys(store, b"pepper", clock)


def test_a_fresh_key_proves_tenant_and_scopes(keys: Keys) -> None:
    key_id, text = keys.create("acme", "test", ["inference", "admin"])
    principal = keys.verify(text)
    assert (principal.tenant, principal.key_id) == ("acme", key_id)
    assert principal.can("admin")
    assert not principal.can("root")


def test_text_has_id_secret_and_checksum(keys: Keys) -> None:
    key_id, text = keys.create("acme", "test", ["inference"])
    assert text.startswith(f"mk_{key_id}")
    assert int(text[-8:], 16) == zlib.crc32(text[:-8].encode())
    assert len(bytes.fromhex(text[15:-8])) == 32


def test_the_database_holds_nothing_that_verifies(keys: Keys, store: Store) -> None:
    _, text = keys.create("acme", "test", ["inference"])
    with store.read() as connection:
        stored = " ".join(map(str, connection.execute(sa.select(api_keys)).one()))
    assert text[15:-8] not in stored
    assert bytes.fromhex(text[15:-8]) not in Path(str(store.url.database)).read_bytes()
    with pytest.raises(Unauthenticated):
        Keys(store, b"another pepper").verify(text)


def test_a_key_ends_when_it_expires(keys: Keys, clock: Clock) -> None:
    _, text = keys.create("acme", "test", ["inference"], expires_at=1010.0)
    clock.now = 1009.9
    keys.verify(text)
    clock.now = 1010.0
    with pytest.raises(Unauthenticated, match="expired"):
        keys.verify(text)


def test_a_revoked_key_is_refused_and_revoking_again_keeps_the_first_time(keys: Keys, clock: Clock) -> None:
    key_id, text = keys.create("acme", "test", ["inference"])
    keys.revoke(key_id)
    clock.now = 2000.0
    keys.revoke(key_id)
    with pytest.raises(Unauthenticated, match="revoked"):
        keys.verify(text)
    assert keys.list()[0].revoked_at == 1000.0
    with pytest.raises(NotFound):
        keys.revoke("nope")


def test_listing_is_by_tenant(keys: Keys) -> None:
    keys.create("acme", "one", ["inference"])
    keys.create("other", "two", ["admin"])
    assert [key.name for key in keys.list()] == ["one", "two"] or len(keys.list()) == 2
    assert [key.name for key in keys.list("other")] == ["two"]


@pytest.mark.parametrize(
    ("tenant", "name", "scopes", "expires_at", "param"),
    [
        ("../x", "n", ["inference"], None, "tenant"),
        ("acme", "", ["inference"], None, "name"),
        ("acme", "a\nb", ["inference"], None, "name"),
        ("acme", "n", [], None, "scopes"),
        ("acme", "n", ["root"], None, "scopes"),
        ("acme", "n", ["inference"], 999.0, "expires_at"),
        ("acme", "n", ["inference"], float("nan"), "expires_at"),
    ],
)
def test_keys_out_of_range_are_refused(
    keys: Keys, tenant: str, name: str, scopes: list[str], expires_at: float | None, param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        keys.create(tenant, name, scopes, expires_at)
    assert caught.value.param == param


def test_unknown_ids_and_wrong_secrets_read_the_same(keys: Keys) -> None:
    _, text = keys.create("acme", "test", ["inference"])
    messages = set()
    for body in (f"mk_{'0' * 12}{text[15:-8]}", f"{text[:15]}{'0' * 64}"):
        with pytest.raises(Unauthenticated) as caught:
            keys.verify(f"{body}{zlib.crc32(body.encode()):08x}")
        messages.add(caught.value.message)
    assert len(messages) == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_no_changed_key_is_accepted_and_no_error_shows_it(keys: Keys, data: st.DataObject) -> None:
    _, text = keys.create("acme", "test", ["inference"])
    place = data.draw(st.integers(0, len(text) - 1))
    sign = data.draw(st.characters())
    changed = text[:place] + sign + text[place + 1 :]
    if changed == text:
        return
    with pytest.raises(Unauthenticated) as caught:
        keys.verify(changed)
    assert changed not in caught.value.message


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_refused_without_another_error(keys: Keys, text: str) -> None:
    with pytest.raises(Unauthenticated):
        keys.verify(text)
