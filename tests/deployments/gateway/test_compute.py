"""Compute seconds reach the ledger however a call ends, over all entrances, from every kind of model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.settings import Settings
from cluster.store import Store
from cluster.tenancy.metered import Metered
from cluster.tenancy.usage_report import Question, usage
from deployments.gateway.tenancy import Tenancy
from tests.deployments.gateway.conftest import Server, eventually, serving
from tests.deployments.predict.tables import FLOWERS, TableModels
from tests.fakes import WORD_US, KeyRing

CHAT: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "one two three"}]}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(Settings(home=tmp_path).store_url)
    store.migrate()
    yield store
    store.close()


@pytest.fixture
def server(tmp_path: Path, store: Store, iris: Path) -> Iterator[Server]:
    models, options = TableModels(iris=iris), {"cache_bytes": 1 << 20, "cache_tenant_bytes": 1 << 19}
    with serving(models, tenancy=Tenancy.of(store, Settings(home=tmp_path)), verify=KeyRing().verify, **options) as server:
        yield server


def booked(store: Store) -> dict[str, Metered]:
    """By outcome."""
    now = time.time()
    return {each.group["outcome"]: each.metered for each in usage(store, Question(now - 600, now + 600, by=("outcome",)))}


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("chat/completions", CHAT, 3),
        ("chat/completions", CHAT | {"stream": True}, 3),
        ("chat/completions", CHAT | {"n": 2}, 3),
        ("completions", {"model": "echo", "prompt": ["one two", "one two three four"]}, 6),
    ],
)
def test_an_answer_is_booked_with_what_it_took(server: Server, store: Store, path: str, body: dict[str, Any], words: int) -> None:
    with server.http() as http:
        assert http.post(f"/v1/{path}", json=body).status_code == 200
    eventually(lambda: bool(booked(store)))
    (found,) = booked(store).values()
    assert found.compute_seconds == words * WORD_US


def test_who_hangs_up_pays_for_what_was_computed_until_then(server: Server, store: Store) -> None:
    """Prompt and compute: nobody gets them for nothing by leaving before the end."""
    server.models.delay_s = 0.3
    body = {"model": "echo", "prompt": ["one two three four five six", "seven eight nine ten eleven"], "stream": True}
    with server.http() as http, http.stream("POST", "/v1/completions", json=body) as answer:
        next(line for line in answer.iter_lines() if '"index":1' in line)
    eventually(lambda: bool(booked(store)))
    gone = booked(store)["client_gone"]
    assert gone.input_tokens + gone.cached_tokens == 14, "of both prompts"
    assert gone.cached_tokens == 6
    assert gone.compute_seconds % WORD_US == 0
    assert 2 * WORD_US <= gone.compute_seconds < 11 * WORD_US


def test_nobody_pays_compute_for_an_answer_from_the_cache(server: Server, store: Store) -> None:
    body = CHAT | {"temperature": 0}
    with server.http() as http:
        assert [http.post("/v1/chat/completions", json=body).headers["x-cache"] for _ in range(3)] == ["miss", "hit", "hit"]
        many = {"model": "echo", "prompt": ["one two three", "one two three"], "temperature": 0}
        assert http.post("/v1/completions", json=many).headers["x-cache"] == "miss"
    eventually(lambda: booked(store)["finished"].requests == 4)
    assert booked(store)["finished"].compute_seconds == 2 * 3 * WORD_US, "two answers were computed"
    assert booked(store)["finished"].replayed_tokens == 20


def test_a_table_is_booked_with_what_it_took(server: Server, store: Store) -> None:
    rows = {"name": "input-0", "shape": [3, 4], "datatype": "FP64", "data": FLOWERS[:3].ravel().tolist()}
    with server.http() as http:
        answer = http.post("/v2/models/iris/infer", json={"inputs": [rows]})
    assert answer.status_code == 200, answer.text
    eventually(lambda: bool(booked(store)))
    found = booked(store)["finished"]
    assert found.compute_seconds > 0
    assert (found.input_tokens, found.output_tokens) == (0, 0)
