from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import Conflict, InvalidRequest, NotFound, Unauthenticated
from cluster.store import Store
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.key_records import api_keys
from cluster.tenancy.keys import LAST_USED_S, Keys
from cluster.tenancy.permissions import expand
from cluster.tenancy.projects import DEFAULT, projects
from tests.cluster.tenancy.conftest import Clock


@pytest.fixture
def keys(accounts: Accounts) -> Keys:
    with accounts._store.begin() as connection:
        connection.execute(projects.insert().values(id="acme", organization_id=DEFAULT, name="acme", created_at=1.0))
        connection.execute(projects.insert().values(id="other", organization_id=DEFAULT, name="other", created_at=2.0))
    return accounts.keys


def test_a_fresh_key_proves_tenant_and_scopes(keys: Keys) -> None:
    key_id, text = keys.create("acme", "test", ["inference", "annotate"])
    principal = keys.verify(text)
    assert (principal.tenant, principal.key_id, principal.organization) == ("acme", key_id, DEFAULT)
    assert principal.can("annotate")
    assert not principal.can("admin")


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
    if store.engine.dialect.name == "sqlite":
        assert bytes.fromhex(text[15:-8]) not in Path(str(store.url.database)).read_bytes()
    with pytest.raises(Unauthenticated):
        Keys(store, b"another pepper").verify(text)


def test_a_key_ends_when_it_expires(keys: Keys, clock: Clock) -> None:
    _, text = keys.create("acme", "test", ["inference"], expires_at=clock() + 10)
    clock.now += 9.9
    keys.verify(text)
    clock.now += 0.1
    with pytest.raises(Unauthenticated, match="expired"):
        keys.verify(text)


def test_a_revoked_key_is_refused_and_revoking_again_keeps_the_first_time(keys: Keys, clock: Clock) -> None:
    key_id, text = keys.create("acme", "test", ["inference"])
    keys.revoke(key_id)
    clock.now += 1000.0
    keys.revoke(key_id)
    with pytest.raises(Unauthenticated, match="revoked"):
        keys.verify(text)
    assert keys.list()[0].revoked_at == 1_795_435_200.0
    with pytest.raises(NotFound):
        keys.revoke("nope")


def test_listing_is_by_tenant(keys: Keys) -> None:
    keys.create("acme", "one", ["inference"])
    keys.create("other", "two", ["inference"])
    assert {key.name for key in keys.list()} == {"one", "two"}
    assert [key.name for key in keys.list("other")] == ["two"]


@pytest.mark.parametrize(
    ("tenant", "name", "scopes", "expires_at", "param"),
    [
        ("acme", "", ["inference"], None, "name"),
        ("acme", "a\nb", ["inference"], None, "name"),
        ("acme", "n", [], None, "scopes"),
        ("acme", "n", ["root"], None, "scopes"),
        ("acme", "n", ["inference", "admin"], None, "scopes"),
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


def test_admin_keys_and_project_keys_are_two_worlds(accounts: Accounts, keys: Keys) -> None:
    key_id, text = keys.create_admin(DEFAULT, "root", ["organization"])
    principal = keys.verify(text)
    assert (principal.tenant, principal.organization) == ("", DEFAULT)
    assert principal.scopes == expand({"organization"})
    assert not principal.can("inference")
    assert not principal.can("admin")
    with pytest.raises(InvalidRequest):
        keys.create_admin(DEFAULT, "both", ["organization", "inference"])
    with pytest.raises(NotFound):
        keys.get(DEFAULT, "acme", key_id)
    project_key, _ = keys.create("acme", "test")
    with pytest.raises(NotFound):
        keys.get(DEFAULT, None, project_key)
    assert [key.id for key in keys.page(DEFAULT, None).items] == [key_id]
    assert [key.id for key in keys.page(DEFAULT, "acme").items] == [project_key]
    other = accounts.projects.found("other").id
    with pytest.raises(NotFound):
        keys.get(other, None, key_id)


def test_a_key_is_for_the_models_of_its_list(keys: Keys) -> None:
    key_id, text = keys.create("acme", "test", models=["chat", "chat:poet"])
    assert keys.verify(text).may_call("chat:poet")
    assert not keys.verify(text).may_call("big")
    keys.update(DEFAULT, "acme", key_id, models=["big"])
    assert keys.verify(text).may_call("big")
    assert keys.verify(keys.create("acme", "any")[1]).may_call("anything")
    for models in ([], ["a b"], ["../x"], ["x" * 200], [f"m{n}" for n in range(101)]):
        with pytest.raises(InvalidRequest) as caught:
            keys.create("acme", "test", models=models)
        assert caught.value.param == "models"


def test_a_rotated_key_and_its_successor_overlap(keys: Keys, clock: Clock) -> None:
    old_id, old = keys.create("acme", "test", ["annotate"], models=["chat"])
    new_id, new = keys.rotate(old_id, overlap_s=100.0)
    assert keys.verify(old).key_id == old_id
    after = keys.verify(new)
    assert (after.key_id, after.tenant, after.scopes, after.models) == (new_id, "acme", {"annotate"}, {"chat"})
    clock.now += 99.9
    keys.verify(old)
    with pytest.raises(Conflict):
        keys.rotate(old_id)
    clock.now += 0.1
    with pytest.raises(Unauthenticated, match="expired"):
        keys.verify(old)
    keys.verify(new)
    assert keys.get(DEFAULT, "acme", old_id).replaced_by == new_id
    keys.revoke(new_id)
    with pytest.raises(Conflict):
        keys.rotate(new_id)


def test_of_several_rotations_at_once_one_succeeds(keys: Keys) -> None:
    old_id, _ = keys.create("acme", "test")

    def rotated(_: int) -> bool:
        try:
            keys.rotate(old_id)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert sorted(threads.map(rotated, range(4))) == [False, False, False, True]
    assert len(keys.list("acme")) == 2


def test_rotation_never_lengthens_a_life(keys: Keys, clock: Clock) -> None:
    old_id, _ = keys.create("acme", "test", expires_at=clock.now + 10)
    new_id, _ = keys.rotate(old_id, overlap_s=1000.0)
    ends = [keys.get(DEFAULT, "acme", key_id).expires_at for key_id in (old_id, new_id)]
    assert ends == [clock.now + 10] * 2
    with pytest.raises(InvalidRequest):
        keys.rotate(new_id, overlap_s=-1.0)


def test_last_use_is_kept_to_the_minute(keys: Keys, clock: Clock) -> None:
    key_id, text = keys.create("acme", "test")
    assert keys.get(DEFAULT, "acme", key_id).last_used_at is None
    keys.verify(text)
    first = clock.now
    clock.now += LAST_USED_S - 1
    keys.verify(text)
    assert keys.get(DEFAULT, "acme", key_id).last_used_at == first
    clock.now += 1
    keys.verify(text)
    assert keys.get(DEFAULT, "acme", key_id).last_used_at == clock.now


def test_a_change_of_a_key_holds_at_once(keys: Keys, clock: Clock) -> None:
    key_id, text = keys.create("acme", "test")
    keys.update(DEFAULT, "acme", key_id, scopes=["annotate"], expires_at=clock.now + 5)
    assert keys.verify(text).scopes == {"annotate"}
    clock.now += 5
    with pytest.raises(Unauthenticated):
        keys.verify(text)
    with pytest.raises(InvalidRequest):
        keys.update(DEFAULT, "acme", key_id, scopes=["admin"])
    with pytest.raises(NotFound):
        keys.update(DEFAULT, "other", key_id, scopes=["inference"])
