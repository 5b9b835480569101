"""`Idempotency-Key` over HTTP, against the real store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import sqlalchemy as sa

from cluster.errors import ModelError
from cluster.store import Store
from cluster.tenancy.idempotency import LEASE_S, Bounds, Idempotency, Replay, Run, idempotency, idempotency_totals
from cluster.tenancy.journal_tables import usage_records
from cluster.tenancy.ledger import Ledger
from cluster.tenancy.metering import Metering
from cluster.tenancy.reconcile import problems
from cluster.types import Principal
from deployments.gateway.once import Once
from deployments.gateway.tenancy import Tenancy
from tests.deployments.gateway.conftest import Server, eventually, serving
from tests.fakes import EchoModels, KeyRing
from tests.free_ports import free_port

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "one two three"}]}
KEY = {"Idempotency-Key": "k"}


@dataclass
class Keyed:
    server: Server
    store: Store

    @property
    def executions(self) -> int:
        return len(self.server.models.requests)

    def done(self) -> int:
        with self.store.read() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(idempotency).where(idempotency.c.run.is_(None))) or 0


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('once')}/mmaas.db")
    store.migrate()
    tenancy = Tenancy(once=Once(Idempotency(store, Bounds(answer_bytes=20_000)), most=60))
    with serving(tenancy=tenancy) as server:
        server.keys.principals["mk_other_01234567"] = Principal("other", "key_other", frozenset({"inference"}))
        yield Keyed(server, store)
    store.close()


@pytest.fixture
def keyed(running: Keyed) -> Keyed:
    eventually(lambda: running.server.models.open == 0)
    vars(running.server.models).update(vars(EchoModels()))
    with running.store.begin() as connection:
        connection.execute(idempotency.delete())
        connection.execute(idempotency_totals.delete())
    return running


def test_the_answer_comes_again_byte_for_byte_and_runs_once(keyed: Keyed) -> None:
    with keyed.server.http() as http:
        first, again = (http.post("/v1/chat/completions", json=CHAT, headers=KEY) for _ in range(2))
    assert first.status_code == again.status_code == 200
    assert first.content == again.content
    assert first.headers["content-type"] == again.headers["content-type"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert first.headers["x-request-id"] != again.headers["x-request-id"]
    assert keyed.executions == 1


def test_a_stream_comes_again_byte_for_byte(keyed: Keyed) -> None:
    asked = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    keyed.server.models.delay_s = 0.02
    with keyed.server.http() as http:
        first, again = (http.post("/v1/chat/completions", json=asked, headers=KEY) for _ in range(2))
    assert first.content == again.content
    assert first.content.endswith(b"data: [DONE]\n\n")
    assert first.content.count(b"data: ") > 4
    assert again.headers["content-type"] == first.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert keyed.executions == 1


def test_a_stream_with_a_key_is_still_a_stream(keyed: Keyed) -> None:
    keyed.server.models.delay_s = 0.1
    came = []
    with (
        keyed.server.http() as http,
        http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}, headers=KEY) as answer,
    ):
        for line in answer.iter_lines():
            if line:
                came.append(time.monotonic())
    assert came[-1] - came[0] > 0.15


def test_the_official_client_gets_the_stored_answer(keyed: Keyed) -> None:
    with keyed.server.client() as client:
        first, again = (client.chat.completions.create(**CHAT, extra_headers=KEY) for _ in range(2))
        said = ["".join(chunk.choices[0].delta.content or "" for chunk in stream) for stream in streams(client)]
    assert first == again
    assert said == ["one two three"] * 2
    assert keyed.executions == 2


def streams(client: openai.OpenAI) -> Iterator[openai.Stream[openai.types.chat.ChatCompletionChunk]]:
    for _ in range(2):
        yield client.chat.completions.create(**CHAT, stream=True, extra_headers={"Idempotency-Key": "stream"})


def test_another_body_with_the_key_is_422(keyed: Keyed) -> None:
    with keyed.server.http() as http:
        http.post("/v1/chat/completions", json=CHAT, headers=KEY)
        other = http.post("/v1/chat/completions", json={**CHAT, "n": 2}, headers=KEY)
        elsewhere = http.post("/v1/completions", json=CHAT, headers=KEY)
    for answer in (other, elsewhere):
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert keyed.executions == 1


def test_fifty_at_once_run_once_and_the_others_wait_or_get_the_answer(keyed: Keyed) -> None:
    keyed.server.models.first_delay_s = 0.3

    def post(_: int) -> httpx.Response:
        with keyed.server.http() as http:
            return http.post("/v1/chat/completions", json=CHAT, headers=KEY)

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(post, range(50)))
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses[200] >= 1
    assert set(statuses) == {200, 409}
    assert len({answer.content for answer in answers if answer.status_code == 200}) == 1
    waiting = next(answer for answer in answers if answer.status_code == 409)
    assert waiting.json()["error"]["code"] == "idempotency_in_progress"
    assert waiting.headers["retry-after"] == "1"
    assert "x-should-retry" not in waiting.headers
    assert keyed.executions == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_leaves_finds_the_answer_when_it_comes_back(keyed: Keyed, stream: bool) -> None:
    keyed.server.models.first_delay_s, keyed.server.models.delay_s = 0.5, 0.05
    asked = {**CHAT, "stream": stream}
    with keyed.server.http() as http:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json=asked, headers=KEY, timeout=0.2)
        eventually(lambda: keyed.done() == 1)
        answer = http.post("/v1/chat/completions", json=asked, headers=KEY)
    assert answer.headers["idempotent-replayed"] == "true"
    assert "three" in answer.text
    assert keyed.executions == 1


def test_without_a_key_leaving_still_stops_the_work(keyed: Keyed) -> None:
    keyed.server.models.first_delay_s = 5
    with keyed.server.http() as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/chat/completions", json=CHAT, timeout=0.2)
    eventually(lambda: keyed.server.models.open == 0, 3)


def test_what_failed_runs_again(keyed: Keyed) -> None:
    keyed.server.models.error = ModelError("no numbers")
    with keyed.server.http() as http:
        assert http.post("/v1/chat/completions", json=CHAT, headers=KEY).status_code == 500
        keyed.server.models.error, keyed.server.models.fail_after = ModelError("no numbers"), 2
        broken = http.post("/v1/chat/completions", json={**CHAT, "stream": True}, headers=KEY)
        assert broken.status_code == 200
        assert "no numbers" in broken.text
        assert "[DONE]" not in broken.text
        keyed.server.models.error = None
        assert http.post("/v1/chat/completions", json=CHAT, headers=KEY).status_code == 200
    assert keyed.executions == 3


def test_what_was_refused_is_not_remembered(keyed: Keyed) -> None:
    with keyed.server.http() as http:
        assert http.post("/v1/chat/completions", json={"model": "echo"}, headers=KEY).status_code == 400
        assert http.post("/v1/chat/completions", json={**CHAT, "model": "none"}, headers=KEY).status_code == 404
        assert http.post("/v1/chat/completions", json=CHAT, headers=KEY).status_code == 200


def test_tenants_do_not_meet_and_scopes_come_first(keyed: Keyed) -> None:
    with (
        keyed.server.http() as http,
        keyed.server.http("mk_other_01234567") as other,
        keyed.server.http("mk_no_scope_012345") as none,
    ):
        assert http.post("/v1/chat/completions", json=CHAT, headers=KEY).status_code == 200
        theirs = other.post("/v1/chat/completions", json={**CHAT, "n": 2}, headers=KEY)
        assert theirs.status_code == 200
        assert "idempotent-replayed" not in theirs.headers
        assert none.post("/v1/chat/completions", json=CHAT, headers=KEY).status_code == 403
    assert [request.tenant for request in keyed.server.models.requests] == ["acme", "other"]


@pytest.mark.parametrize("key", ["", "x" * 256, "ü".encode()])
def test_what_can_be_no_key_is_400(keyed: Keyed, key: str | bytes) -> None:
    with keyed.server.http() as http:
        answer = http.post("/v1/chat/completions", json=CHAT, headers={b"Idempotency-Key": key})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key")


def test_two_keys_are_400_and_reading_needs_none(keyed: Keyed) -> None:
    with keyed.server.http() as http:
        two = http.post("/v1/chat/completions", json=CHAT, headers=[("Idempotency-Key", "a"), ("Idempotency-Key", "b")])
        assert two.status_code == 400
        assert http.get("/v1/models", headers={"Idempotency-Key": "\u00fc".encode()}).status_code == 200


def test_an_answer_too_long_to_keep_is_given_once_and_not_made_again(keyed: Keyed) -> None:
    asked = {**CHAT, "messages": [{"role": "user", "content": "word " * 6000}]}
    with keyed.server.http() as http:
        assert http.post("/v1/chat/completions", json=asked, headers=KEY).status_code == 200
        again = http.post("/v1/chat/completions", json=asked, headers=KEY)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "idempotency_answer_gone")
    assert again.headers["x-should-retry"] == "false"
    assert keyed.executions == 1


def test_embeddings_come_again_too(keyed: Keyed) -> None:
    with keyed.server.http() as http:
        first, again = (http.post("/v1/embeddings", json={"model": "echo", "input": "a b"}, headers=KEY) for _ in range(2))
    assert first.content == again.content
    assert len(keyed.server.models.encoded) == 1


def test_callers_who_left_do_not_pile_up_without_bound(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/mmaas.db")
    store.migrate()
    models = EchoModels()
    models.first_delay_s = 2.0
    with serving(models, tenancy=Tenancy(once=Once(Idempotency(store), most=3))) as server, server.http() as http:
        for number in range(3):
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chat/completions", json=CHAT, headers={"Idempotency-Key": str(number)}, timeout=0.2)
        assert http.post("/v1/chat/completions", json=CHAT, headers={"Idempotency-Key": "3"}).status_code == 503
        eventually(lambda: models.open == 0)
    store.close()


class Slow(Idempotency):
    def begin(self, tenant: str, key: str, request: bytes) -> Replay | Run:
        time.sleep(0.5)
        return super().begin(tenant, key, request)


def test_who_leaves_before_the_work_has_begun_finds_its_answer_too(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/mmaas.db")
    store.migrate()
    with serving(tenancy=Tenancy(once=Once(Slow(store)))) as server, server.http() as http:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json=CHAT, headers=KEY, timeout=0.2)
        eventually(lambda: len(server.models.requests) == 1 and server.models.open == 0)
        eventually(lambda: running_keys(store) == 0)
        assert http.post("/v1/chat/completions", json=CHAT, headers=KEY).headers["idempotent-replayed"] == "true"
        assert len(server.models.requests) == 1
    store.close()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_stored_and_paid_at_once_or_not_at_all(tmp_path: Path, stream: bool) -> None:
    """Whoever looks at any moment finds both or neither: so does who comes after a kill."""
    store = Store(f"sqlite:///{tmp_path}/mmaas.db")
    store.migrate()
    tenancy = Tenancy(once=Once(Idempotency(store)), metering=Metering(Ledger(store)))
    seen, asked, over = Counter[tuple[int, int]](), {**CHAT, "stream": stream}, threading.Event()

    def look() -> None:
        stored = sa.select(sa.func.count()).select_from(idempotency).where(idempotency.c.run.is_(None)).scalar_subquery()
        paid = sa.select(sa.func.count()).select_from(usage_records).scalar_subquery()
        while not over.is_set():
            with store.read() as connection:
                seen[tuple(connection.execute(sa.select(stored, paid)).one())] += 1

    looking = threading.Thread(target=look)
    looking.start()
    with serving(tenancy=tenancy) as server, server.http() as http:
        for number in range(200):
            answer = http.post("/v1/chat/completions", json=asked, headers={"Idempotency-Key": str(number)})
            assert answer.status_code == 200
            if number >= 10 and len(seen) > 3:  # who looks may have to wait for many writers
                break
    over.set()
    looking.join()
    assert set(seen) <= {(number, number) for number in range(201)}
    assert len(seen) > 3
    with store.read() as connection:
        assert set(connection.scalars(sa.select(usage_records.c.outcome))) == {"finished"}
    assert problems(store) == []
    store.close()


def test_a_gateway_without_a_store_refuses_keys_by_name(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json=CHAT, headers=KEY)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key")


GATEWAY = """
import socket, sys, uvicorn
from cluster.settings import GatewaySettings
from cluster.store import Store
from cluster.tenancy.idempotency import Idempotency
from deployments.gateway.tenancy import Tenancy
from deployments.gateway.app import build_app
from deployments.gateway.once import Once
from tests.fakes import EchoModels, KeyRing

models = EchoModels()
models.first_delay_s = float(sys.argv[3])
tenancy = Tenancy(once=Once(Idempotency(Store(sys.argv[1]))))
app = build_app(models, KeyRing().verify, GatewaySettings(), tenancy=tenancy)
uvicorn.run(app, port=int(sys.argv[2]), log_config=None, http="httptools", lifespan="off")
"""


def test_a_killed_gateways_call_is_taken_over_when_its_lease_has_ended(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/mmaas.db")
    store.migrate()
    first = Gateway(store, 60.0)
    try:
        waiting = threading.Thread(target=first.post)
        waiting.start()
        eventually(lambda: running_keys(store) == 1)
    finally:
        first.kill()
    waiting.join()
    second = Gateway(store, 0.0)
    try:
        early = second.post()
        assert early is not None
        assert early.status_code == 409
        with store.begin() as connection:  # instead of waiting for its time
            connection.execute(idempotency.update().values(lease_until=idempotency.c.lease_until - LEASE_S))
        late, again = second.post(), second.post()
        assert late is not None
        assert again is not None
        assert (late.status_code, again.headers.get("idempotent-replayed")) == (200, "true")
        assert json.loads(late.content)["choices"][0]["message"]["content"] == "one two three"
        assert late.content == again.content
    finally:
        second.kill()
        store.close()


class Gateway:
    """A gateway in a process of its own, that can be killed."""

    def __init__(self, store: Store, delay_s: float) -> None:
        port = free_port()
        root = Path(__file__).parents[3]
        self.process = subprocess.Popen([sys.executable, "-c", GATEWAY, str(store.url), str(port), str(delay_s)], cwd=root)
        self.url = f"http://127.0.0.1:{port}"
        eventually(self._is_up, 60)

    def _is_up(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").status_code == 200
        except httpx.TransportError:
            return False

    def post(self) -> httpx.Response | None:
        headers = {**KEY, "Authorization": f"Bearer {KeyRing.USER}"}
        try:
            return httpx.post(f"{self.url}/v1/chat/completions", json=CHAT, headers=headers, timeout=30)
        except httpx.TransportError:
            return None

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


def running_keys(store: Store) -> int:
    with store.read() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(idempotency).where(idempotency.c.run.is_not(None))) or 0
