"""Secrets planted where they belong and where callers put them by mistake; none may turn up anywhere else.

Every operation is driven: rightly, with a key in every place that takes a string, and with a fault inside. Looked at are every
answer, every log record as it is written, metrics, every table, the database's raw bytes and every file of the platform but its
secrets. So are the texts of a project that didn't agree to have them kept.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from cluster import log
from cluster.errors import PlatformError
from cluster.private_files import Secrets
from cluster.tenancy.consents import Consent
from cluster.tenancy.permissions import INFERENCE
from deployments.gateway.chores import do
from deployments.gateway.protocols import is_open_inference
from tests.cluster.conftest import postgres_url  # noqa: F401 - a fixture
from tests.deployments.gateway.hostile import Place, places, targets, with_string
from tests.deployments.gateway.whole import OPERATIONS, Operation, Tenant, Whole, document, whole

WORDS = "heliotrope"
"""What callers say to models; no field of ours is called so."""


@dataclass
class Driven:
    """A gateway and all that it wrote and said."""

    gateway: Whole
    written: io.StringIO
    secrets: dict[str, str]
    answers: list[tuple[str, int, str]] = field(default_factory=list)  # operation, status, head and body

    def keep(self, name: str, answer: httpx.Response) -> None:
        self.answers.append((name, answer.status_code, f"{answer.headers} {answer.text}"))

    def look(self) -> dict[str, str]:
        home = self.gateway.settings.home
        files = [path for path in home.rglob("*") if path.is_file() and path.parent.name != "secrets"]
        return {
            "log": self.written.getvalue(),
            "tables": "\n".join(tables(self.gateway)),
            "files": "\n".join(f"{path} {path.read_bytes().decode('latin-1')}" for path in files),
            "refusals": "\n".join(text for _, status, text in self.answers if status >= 400),
            "metrics": "\n".join(text for name, _, text in self.answers if name == "GET /metrics"),
        }


def tables(gateway: Whole) -> Iterator[str]:
    """Every row of every table that there is, ours or not, with bytes as text."""
    with gateway.store.read() as connection:
        for name in sa.inspect(connection).get_table_names():
            for row in connection.execute(sa.text(f'SELECT * FROM "{name}"')):
                yield " ".join(value.decode("latin-1") if isinstance(value, bytes) else str(value) for value in row)


@pytest.fixture(params=["sqlite", "postgres"])
def driven(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Driven]:
    written, before, level = io.StringIO(), logging.getLogger().handlers[:], logging.getLogger().level
    url = request.getfixturevalue("postgres_url") if request.param == "postgres" else None
    log.configure("DEBUG", written)
    with whole(tmp_path, url) as gateway:
        secrets = Secrets(gateway.settings.home)
        known = {
            "pepper": secrets.pepper.decode(),
            "audit key": secrets.audit_key.hex(),
            "prefix cache": secrets.prefix_cache.decode(),
            "Ray's token": secrets.ray_token_path.read_text(),
            "operator's key": gateway.operator_key[15:79],
        }
        yield Driven(gateway, written, known)
    logging.getLogger().handlers[:], logging.getLogger().level = before, level


def drive(driven: Driven) -> None:
    """Everything, by a tenant of its own each."""
    quiet, open_ = driven.gateway.tenant("quiet"), driven.gateway.tenant("open")
    for tenant in (quiet, open_):
        driven.secrets |= {f"key {key[3:15]}": secret_of(key) for key in (tenant.owner_key, tenant.project_key)}
    agreed(driven.gateway, open_)
    for chore in driven.gateway.tenancy.chores:
        do(chore)
    for operation in sorted(OPERATIONS, key=lambda one: one.method == "DELETE"):  # these last
        say(driven, operation, quiet, WORDS)
        say(driven, operation, open_, "sesame", {"Idempotency-Key": f"once for {operation}"})
        spend(driven, operation, quiet)
    driven.gateway.server.models.error = RuntimeError(f"a fault that quotes {quiet.project_key}")
    late = driven.gateway.tenant("late")
    for operation in OPERATIONS:
        if operation.scope == INFERENCE:
            say(driven, operation, late, WORDS)
    for chore in driven.gateway.tenancy.chores:
        do(chore)


def agreed(gateway: Whole, tenant: Tenant) -> None:
    gateway.accounts.consents.put(Consent(tenant.ids["projects"], 1))


def secret_of(text: str) -> str:
    """The part of a key that proves something; a token whole."""
    return text[15:79] if text.startswith("mk_") else text


def say(driven: Driven, operation: Operation, tenant: Tenant, words: str, headers: dict[str, str] | None = None) -> None:
    """A right call. Keys that it makes are secrets from then on."""
    body: Any = json.loads(json.dumps(tenant.body(operation)).replace("one two", words))
    answer = tenant.ask(operation, driven.gateway.key(operation, tenant), json=body, headers=headers or {})
    driven.keep(str(operation), answer)
    if answer.status_code == 200 and operation.method == "POST" and operation.scope != INFERENCE:
        said = answer.json()
        made = [said.get("value"), said.get("token"), (said.get("api_key") or {}).get("value")]
        driven.secrets |= {f"{len(driven.secrets)} by {operation}": secret_of(text) for text in made if text}


def spend(driven: Driven, operation: Operation, tenant: Tenant) -> None:
    """A key wherever the operation takes a string, but for what a caller wants stored. Names of
    models and tensors are told back to their caller."""
    for place in places({**document(), "paths": {operation.path: {operation.method.lower(): operation.facts}}}):
        if place.kind != "body" or operation.scope == INFERENCE:
            for options in misplaced(place, tenant.project_key):
                answer = tenant.ask(operation, driven.gateway.key(operation, tenant), **options)
                if "model" not in str(place.name) and not is_open_inference(place.path):
                    driven.keep(f"misplaced in {place}", answer)
    for header in ("x-api-key", "cookie", "x-request-id", "openai-organization", "idempotency-key"):
        driven.keep(f"misplaced in {header}", tenant.ask(operation, headers={header: tenant.project_key}))


def misplaced(place: Place, key: str) -> list[dict[str, Any]]:
    if place.kind == "body":
        return [{"json": with_string(place, key)}]
    return [{"path": targets(place, key)[0]}]


def leaked(driven: Driven) -> list[str]:
    """Which secrets are where."""
    looked_at = driven.look()
    found = [f"{where}: {name}" for where, text in looked_at.items() for name, secret in driven.secrets.items() if secret in text]
    told = [
        name
        for name, secret in driven.secrets.items()
        if sum(secret in text for where, _, text in driven.answers if not where.startswith("misplaced")) > 1
    ]
    words = [where for where, text in looked_at.items() if WORDS in text]
    return [*found, *(f"answered twice: {name}" for name in told), *(f"{where}: {WORDS}" for where in words)]


def test_no_secret_and_no_word_is_ever_written_or_told(driven: Driven) -> None:
    drive(driven)
    assert leaked(driven) == [], [
        (name, status) for name, status, text in driven.answers if any(s in text for s in driven.secrets.values())
    ]
    written = driven.written.getvalue()
    assert "a fault that quotes" in written
    lines = [json.loads(line) for line in written.splitlines()]
    assert len([line for line in lines if line["message"] == "request"]) > 500
    assert {status for _, status, _ in driven.answers} >= {200, 204, 400, 401, 404, 500}
    kept = driven.gateway.settings.home / "kept"
    assert len(list(kept.iterdir())) == 1, "of the project that agreed, and no other"
    assert len(driven.secrets) > 12


@pytest.mark.parametrize("planted", ["log", "answer", "tables", "words"])
def test_a_planted_leak_is_found(driven: Driven, planted: str) -> None:
    secret = driven.gateway.operator_key
    if planted == "log":
        logging.getLogger("deployments").info("the secret is %s", secret[15:79])
    elif planted == "answer":
        driven.answers.append(("GET /", 401, str(PlatformError(f"wrong key {secret}"))))
    else:
        with driven.gateway.store.begin() as connection:
            connection.execute(sa.text("CREATE TABLE planted (what TEXT)"))
            text = secret if planted == "tables" else f"something with {WORDS}"
            connection.execute(sa.text("INSERT INTO planted VALUES (:what)"), {"what": text})
    try:
        assert leaked(driven)
    finally:
        with driven.gateway.store.begin() as connection:
            connection.execute(sa.text("DROP TABLE IF EXISTS planted"))
