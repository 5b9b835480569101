from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.desired import Desired
from cluster.errors import InvalidRequest, ModelNotFound
from cluster.store import Store
from cluster.tenancy.acts import Change
from cluster.types import Deployment


@pytest.fixture
def desired(tmp_path: Path) -> Iterator[Desired]:
    store = Store(f"sqlite:///{tmp_path}/mmaas.db")
    store.migrate()
    yield Desired(store, clock=lambda: 100.0)
    store.close()


CHAT = Deployment(
    "chat", "models:/chat@champion", tp=2, dtype="bfloat16", min_replicas=1, max_replicas=3, max_model_len=512, quantization="int8"
)


def test_changes_are_noted_in_the_transaction_that_makes_them(desired: Desired) -> None:
    noted: list[tuple[object, ...]] = []

    def note(connection: object, change: Change) -> None:
        noted.append((change.action, change.target, change.before, change.after))
        if len(noted) == 3:
            raise RuntimeError("no log, no change")

    store = desired._store
    desired = Desired(store, note=note)
    first = desired.put(Deployment("a", "models:/a@b", created_at=5.0))
    second = desired.put(Deployment("a", "models:/a@c", created_at=5.0))
    with pytest.raises(RuntimeError, match="no log"):
        desired.delete("a")
    was, is_ = dataclasses.asdict(first), dataclasses.asdict(second)
    assert noted == [
        ("model.deployed", "a", None, was),
        ("model.deployed", "a", was, is_),
        ("model.undeployed", "a", is_, None),
    ]
    assert desired.get("a") == second
    Desired(store).delete("a")


def test_what_was_put_comes_back(desired: Desired) -> None:
    put = desired.put(CHAT)
    assert put == dataclasses.replace(CHAT, created_at=100.0)
    assert desired.get("chat") == put
    desired.put(Deployment("another", "models:/a/1"))
    assert [deployment.name for deployment in desired.list()] == ["another", "chat"]


def test_replacing_keeps_the_time_of_creation(desired: Desired) -> None:
    desired.put(dataclasses.replace(CHAT, created_at=5.0))
    replaced = desired.put(dataclasses.replace(CHAT, tp=4, created_at=77.0))
    assert (replaced.tp, replaced.created_at) == (4, 5.0)
    assert desired.list() == [replaced]


def test_unknown_names_are_not_found(desired: Desired) -> None:
    with pytest.raises(ModelNotFound, match="'nope'"):
        desired.get("nope")
    with pytest.raises(ModelNotFound):
        desired.delete("nope")


def test_deleted_is_gone(desired: Desired) -> None:
    desired.put(CHAT)
    desired.delete("chat")
    assert desired.list() == []


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("name", "../etc", "name"),
        ("name", "chat\n", "name"),
        ("name", "Chat", "name"),
        ("model", "", "model"),
        ("dtype", "int8", "dtype"),
        ("quantization", "int3", "quantization"),
        ("tp", 0, "tp"),
        ("min_replicas", 4, "replicas"),
        ("max_replicas", 0, "replicas"),
        ("max_model_len", 0, "max_model_len"),
    ],
)
def test_what_can_not_be_served_is_refused(desired: Desired, field: str, value: object, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        desired.put(dataclasses.replace(CHAT, **{field: value}))  # type: ignore[arg-type]
    assert caught.value.param == param
    assert desired.list() == []


@given(st.text(max_size=70))
def test_a_name_is_accepted_only_if_it_is_safe_in_a_path(name: str) -> None:
    store = Store("sqlite://")
    try:
        Desired(store).put(dataclasses.replace(CHAT, name=name))
    except InvalidRequest:
        return
    except Exception:  # accepted: the memory database has no tables
        assert name.isascii()
        assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789._-")
        assert name[0].isalnum()
        assert name[-1].isalnum()
    finally:
        store.close()
