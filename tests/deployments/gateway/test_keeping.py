"""Inputs and outputs that the gateway keeps, from the socket to the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from cluster.errors import ModelError, NotFound
from cluster.settings import GatewaySettings
from cluster.tenancy.consents import Consent
from cluster.tenancy.keeper import Keeper
from cluster.tenancy.kept_files import KeptFiles
from cluster.tenancy.redaction import REDACTIONS
from deployments.gateway import calls
from deployments.gateway.entrance import Entrance
from deployments.gateway.tenancy import Tenancy
from tests.deployments.gateway.conftest import Server, eventually, serving
from tests.fakes import EchoModels, KeyRing

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "call +49 30 901820 now"}]}


@dataclass
class Keeping:
    server: Server
    keeper: Keeper
    files: KeptFiles
    consents: list[Consent]

    def agree(self, *consents: Consent) -> None:
        self.consents[:] = consents
        self.keeper.refresh()


@pytest.fixture
def keeping(tmp_path: Path) -> Iterator[Keeping]:
    files, consents = KeptFiles(tmp_path / "kept"), list[Consent]()
    keeper = Keeper(files, lambda: consents, REDACTIONS, call_bytes=4096)
    with serving(tenancy=Tenancy(keeper=keeper)) as server:
        keeping = Keeping(server, keeper, files, consents)
        keeping.agree(Consent("acme", 1, redaction="contacts"))
        yield keeping


def post(keeping: Keeping, **asked: object) -> httpx.Response:
    with keeping.server.http() as http:
        return http.post("/v1/chat/completions", json={**CHAT, **asked})


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_kept_redacted_and_found_by_its_request_id(keeping: Keeping, stream: bool) -> None:
    answer = post(keeping, stream=stream)
    assert "901820" in answer.text
    eventually(lambda: keeping.keeper.write() == 1)  # handed over just after the last byte
    kept = keeping.files.find("acme", answer.headers["x-request-id"])
    assert (kept.operation, kept.model, kept.status, kept.key_id) == ("/v1/chat/completions", "echo", 200, "key_user")
    assert kept.is_complete
    assert (kept.prompt_tokens, kept.completion_tokens) == (7, 5)
    assert json.loads(kept.input)["messages"][0]["content"] == "call [number] now"
    choice = json.loads(kept.output)["choices"][0]
    assert (choice["content"] if stream else choice["message"]["content"]) == "call [number] now"


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_over_a_handle_are_kept_too(keeping: Keeping, stream: bool) -> None:
    entrance = Entrance.of(EchoModels(), KeyRing().verify, GatewaySettings(), tenancy=Tenancy(keeper=keeping.keeper))
    answers = [part async for part in calls.call(entrance, KeyRing.USER, "chat.completions", {**CHAT, "stream": stream})]
    assert keeping.keeper.write() == 1
    request_id = str(answers[0]["id"]).replace("chatcmpl-", "req_")
    kept = keeping.files.find("acme", request_id)
    choice = json.loads(kept.output)["choices"][0]
    assert (choice["content"] if stream else choice["message"]["content"]) == "call [number] now"
    assert (kept.operation, kept.status, kept.is_complete) == ("chat.completions", 200, True)


def test_without_consent_nothing_is_kept(keeping: Keeping, tmp_path: Path) -> None:
    for consents in ((), (Consent("acme", 0),), (Consent("other", 1),)):
        keeping.agree(*consents)
        post(keeping)
        assert keeping.keeper.write() == 0
    assert not list(tmp_path.rglob("*.parquet"))


def test_what_asks_no_model_or_fails_is_not_kept(keeping: Keeping) -> None:
    with keeping.server.http() as http:
        http.get("/v1/models")
        http.post("/v1/chat/completions", json={"model": "none"})
    keeping.server.models.error = ModelError("no numbers")
    post(keeping)
    assert keeping.keeper.write() == 0


def test_an_answer_that_broke_off_is_kept_as_such(keeping: Keeping) -> None:
    keeping.server.models.error, keeping.server.models.fail_after = ModelError("no numbers"), 2
    answer = post(keeping, stream=True)
    eventually(lambda: keeping.keeper.write() == 1)  # handed over just after the last byte
    assert not keeping.files.find("acme", answer.headers["x-request-id"]).is_complete


def test_what_is_too_long_is_answered_and_not_kept(keeping: Keeping) -> None:
    answer = post(keeping, messages=[{"role": "user", "content": "word " * 1000}])
    assert answer.status_code == 200
    assert keeping.keeper.write() == 0
    with pytest.raises(NotFound):
        keeping.files.find("acme", answer.headers["x-request-id"])
