"""Twenty secrets planted where they belong and where callers put them by mistake; none may turn up anywhere else.

Looked at are every answer, every log record as it is written, the metrics, and the database, both as a dump and as raw bytes.
"""

from __future__ import annotations

import io
import json
import logging
import secrets
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster import log
from cluster.errors import PlatformError
from cluster.settings import GatewaySettings
from cluster.store import Store
from cluster.tenancy.keys import Keys
from deployments.gateway.app import build_app
from tests.deployments.gateway.conftest import Server, serving
from tests.fakes import EchoModels

CHAT = "/v1/chat/completions"


@dataclass
class Place:
    """A gateway over a real store of keys, and everything that it writes."""

    server: Server
    store: Store
    pepper: bytes
    written: io.StringIO
    keys: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    def look(self) -> dict[str, str]:
        database = Path(str(self.store.url.database))
        with sqlite3.connect(database) as connection:
            dump = "\n".join(connection.iterdump())
        raw = b"".join(path.read_bytes() for path in database.parent.glob(database.name + "*")).decode("latin-1")
        return {"log": self.written.getvalue(), "answers": "\n".join(self.answers), "dump": dump, "database": raw}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    store, pepper, written = Store(f"sqlite:///{tmp_path}/mmaas.db"), secrets.token_hex(32).encode(), io.StringIO()
    store.migrate()
    keys, before, level = Keys(store, pepper), logging.getLogger().handlers[:], logging.getLogger().level
    log.configure("DEBUG", written)
    models = EchoModels()
    with serving(models, app=build_app(models, keys.verify, GatewaySettings())) as server:
        made = [keys.create("acme", f"key {number}", ["inference", "admin"])[1] for number in range(10)]
        invented = [text[:15] + secrets.token_hex(32) + text[-8:] for text in made[:5]]
        yield Place(server, store, pepper, written, made + invented)
    logging.getLogger().handlers[:], logging.getLogger().level = before, level
    store.close()


def use(place: Place) -> None:
    """Each key where it belongs, and in every place where somebody has put one before."""
    for key in place.keys:
        proper = {"Authorization": f"Bearer {key}"}
        body = {"model": "echo", "messages": [{"role": "user", "content": "one"}]}
        with place.server.http(place.keys[0]) as http:
            asked = [
                http.get("/v1/models", headers=proper),
                http.get("/metrics", headers=proper),
                http.post(CHAT, json=body, headers=proper),
                http.post(CHAT, json=body | {"stream": True}, headers=proper),
                http.post(CHAT, json=body | {"model": "x"}, headers={"Authorization": key}),
                http.get("/v1/models", headers={"x-api-key": key, "cookie": f"key={key}", "x-request-id": key}),
                http.get(f"/v1/models?api_key={key}"),
                http.get(f"/v1/nothing/{key}"),
                http.post(CHAT, content=f'{{"model": {key}', headers=proper),
                http.post(CHAT, json=body | {"temperature": key}),
                http.post(CHAT, json=body | {"user": key, key: 1}),
            ]
            # What a caller calls a model is told back to that caller, and to nobody else.
            http.post(CHAT, json=body | {"model": key})
            http.get(f"/v1/models/{key}")
        place.answers += [f"{answer.headers} {answer.text}" for answer in asked]


def leaked(place: Place) -> list[str]:
    """The part of a key that proves something, and the pepper, in whatever was looked at."""
    proofs = [key[15:79] for key in place.keys] + [place.pepper.decode()]
    return [f"{where}: {proof[:8]}" for where, text in place.look().items() for proof in proofs if proof in text]


def test_no_secret_is_ever_written_or_told(place: Place) -> None:
    use(place)
    place.server.models.error = RuntimeError(f"a fault that quotes {place.keys[0]}")
    with place.server.http(place.keys[0]) as http:
        place.answers.append(http.post("/v1/completions", json={"model": "echo", "prompt": "one"}).text)
    assert "a fault that quotes" in place.written.getvalue()
    assert leaked(place) == []
    lines = [json.loads(line) for line in place.written.getvalue().splitlines()]
    assert len([line for line in lines if line["message"] == "request"]) >= 15 * 12


@pytest.mark.parametrize("planted", ["log", "answer", "database"])
def test_a_planted_leak_is_found(place: Place, planted: str) -> None:
    secret = place.keys[3]
    if planted == "log":
        logging.getLogger("deployments").info("the secret is %s", secret[15:79])
    elif planted == "answer":
        place.answers.append(str(PlatformError(f"wrong key {secret}")))
    else:
        with sqlite3.connect(str(place.store.url.database)) as connection:
            connection.execute("CREATE TABLE planted (key TEXT)")
            connection.execute("INSERT INTO planted VALUES (?)", (secret,))
    assert leaked(place)
