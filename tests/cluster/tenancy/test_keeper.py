from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import metrics
from cluster.errors import InvalidRequest, NotFound
from cluster.tenancy.consents import DAY_S, Consent
from cluster.tenancy.keeper import Keeper, answer_of
from cluster.tenancy.kept_files import KeptCall, KeptFiles
from cluster.tenancy.redaction import REDACTIONS
from deployments.gateway.exchange import new_request_id
from tests.cluster.tenancy.conftest import Clock

ASKED = {"model": "echo", "messages": [{"role": "user", "content": "I am ada@example.org"}], "max_tokens": 1234567890}
SAID = {"choices": [{"index": 0, "message": {"content": "Hello ada@example.org"}, "logprobs": {"content": [{"token": "ada"}]}}]}


def call(at: float = 1_700_000_000.0, tenant: str = "acme") -> KeptCall:
    told, said = json.dumps(ASKED), json.dumps(SAID)
    return KeptCall(new_request_id(at), at, tenant, "key_1", "/v1/chat/completions", "echo", 200, True, told, said, 3, 4)


class Allowed:
    """Consents of a store that can break."""

    def __init__(self, *consents: Consent) -> None:
        self.consents = list(consents)
        self.broken = False

    def __call__(self) -> list[Consent]:
        if self.broken:
            raise OSError("no database")
        return self.consents


def keeper(path: Path, allowed: Allowed, clock: Clock | None = None, queue_bytes: int = 1 << 20) -> Keeper:
    made = Keeper(KeptFiles(path / "kept"), allowed, REDACTIONS, queue_bytes=queue_bytes, clock=clock or Clock())
    made.refresh()
    return made


def counted(outcome: str) -> float:
    return metrics.KEPT.labels(outcome)._value.get()


def test_a_call_is_found_again_by_its_id_and_by_its_project_alone(tmp_path: Path) -> None:
    files = KeptFiles(tmp_path / "kept")
    calls = [call(1_700_000_000 + 3600.0 * hour, tenant) for hour in range(30) for tenant in ("acme", "other")]
    written = files.write(calls)
    assert len(written) == 6, "two projects, three days"
    for one in calls:
        assert files.find(one.tenant, one.request_id) == one
        with pytest.raises(NotFound) as foreign:
            files.find("acme" if one.tenant == "other" else "other", one.request_id)
        with pytest.raises(NotFound) as absent:
            files.find(one.tenant, new_request_id(one.at))
        assert foreign.value.public_code == absent.value.public_code
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "kept").rglob("*") if path.is_dir()} == {0o700}


@pytest.mark.parametrize("tenant", ["../acme", "/etc", "", "a/b", "a\x00"])
def test_a_project_is_never_a_path(tmp_path: Path, tenant: str) -> None:
    with pytest.raises(InvalidRequest):
        KeptFiles(tmp_path).find(tenant, new_request_id())


@pytest.mark.parametrize("request_id", ["", "req_", "req_../../../../etc/passwd", "req_" + "g" * 32, "chatcmpl-" + "0" * 32])
def test_what_is_no_id_is_not_found(tmp_path: Path, request_id: str) -> None:
    with pytest.raises(NotFound):
        KeptFiles(tmp_path).find("acme", request_id)


def test_only_who_consented_is_kept_and_redacted_as_agreed(tmp_path: Path) -> None:
    made = keeper(tmp_path, Allowed(Consent("acme", 1, redaction="contacts"), Consent("plain", 1, redaction=None)))
    assert made.wants("acme", new_request_id())
    assert not made.wants("other", new_request_id())
    calls = [call(tenant=tenant) for tenant in ("acme", "plain")]
    for one in calls:
        made.offer(one)
    assert made.write() == 2
    files = KeptFiles(tmp_path / "kept")
    redacted = files.find("acme", calls[0].request_id)
    assert json.loads(redacted.input) == {**ASKED, "messages": [{"role": "user", "content": "I am [email]"}]}
    assert json.loads(redacted.output) == {"choices": [{"index": 0, "message": {"content": "Hello [email]"}}]}
    assert json.loads(files.find("plain", calls[1].request_id).output) == SAID


def test_a_consent_that_was_withdrawn_counts_for_what_still_waits(tmp_path: Path) -> None:
    allowed = Allowed(Consent("acme", 1))
    made, before = keeper(tmp_path, allowed), counted("withdrawn")
    made.offer(call())
    allowed.consents = [Consent("acme", 0)]
    assert made.write() == 0
    assert counted("withdrawn") == before + 1


def test_when_consents_can_not_be_known_nothing_is_kept(tmp_path: Path) -> None:
    allowed = Allowed(Consent("acme", 1))
    made, before = keeper(tmp_path, allowed), counted("failed")
    made.offer(call())
    allowed.broken = True
    with pytest.raises(OSError, match="no database"):
        made.write()
    assert counted("failed") == before + 1
    assert not made.wants("acme", new_request_id())
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_full_queue_drops_and_counts(tmp_path: Path) -> None:
    one = call()
    size = len(one.input) + len(one.output)
    made, before = keeper(tmp_path, Allowed(Consent("acme", 1)), queue_bytes=3 * size), counted("queue_full")
    for _ in range(10):
        made.offer(one)
    assert counted("queue_full") == before + 7
    assert made.write() == 3
    made.offer(one)
    assert made.write() == 1


def test_what_can_not_be_read_or_redacted_is_dropped_and_counted(tmp_path: Path) -> None:
    made, before = keeper(tmp_path, Allowed(Consent("acme", 1))), counted("unreadable")
    made.offer(replace(call(), output='data: {"broken'))
    made.offer(replace(call(), input="[" * 100_000))
    assert made.write() == 0
    assert counted("unreadable") == before + 2


def test_a_text_that_came_in_pieces_is_redacted_as_a_whole(tmp_path: Path) -> None:
    pieces = ["Write to ada@", "example", ".org, pl", "ease"]
    events = [{"id": "c", "choices": [{"index": 0, "delta": {"content": piece}, "logprobs": {}}]} for piece in pieces]
    events.append({"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": None})
    stream = ": keepalive\n\n" + "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    assert answer_of(stream) == {
        "id": "c",
        "choices": [{"index": 0, "content": "Write to ada@example.org, please", "finish_reason": "stop"}],
    }
    made, one = keeper(tmp_path, Allowed(Consent("acme", 1, redaction="contacts"))), replace(call(), output=stream)
    made.offer(one)
    made.write()
    assert "Write to [email], please" in KeptFiles(tmp_path / "kept").find("acme", one.request_id).output


def test_tool_calls_of_a_stream_are_put_together() -> None:
    parts = [
        {"index": 0, "id": "c1", "function": {"name": "f", "arguments": '{"a"'}},
        {"index": 0, "function": {"arguments": ": 1}"}},
    ]
    stream = "".join(f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'tool_calls': [part]}}]})}\n\n" for part in parts)
    assert answer_of(stream)["choices"][0]["tool_calls"] == [{"name": "f", "arguments": '{"a": 1}'}]


def test_token_ids_are_text_too(tmp_path: Path) -> None:
    made = keeper(tmp_path, Allowed(Consent("acme", 1, redaction="keys")))
    one = replace(call(), input=json.dumps({"prompt": [[1, 2, 3], [4]]}))
    made.offer(one)
    made.write()
    assert json.loads(KeptFiles(tmp_path / "kept").find("acme", one.request_id).input) == {
        "prompt": ["[3 token ids]", "[1 token ids]"]
    }


def test_what_is_older_than_its_project_allows_is_removed(tmp_path: Path, clock: Clock) -> None:
    clock.now = 1_700_000_000.0
    allowed = Allowed(Consent("acme", 1, keep_s=DAY_S), Consent("other", 1, keep_s=10 * DAY_S))
    made, files = keeper(tmp_path, allowed, clock), KeptFiles(tmp_path / "kept")
    old = [call(clock.now - 2 * DAY_S, tenant) for tenant in ("acme", "other")]
    new = call(clock.now - DAY_S / 2)
    files.write([*old, new])
    assert made.expire() == 1
    with pytest.raises(NotFound):
        files.find("acme", old[0].request_id)
    assert files.find("other", old[1].request_id) == old[1]
    assert files.find("acme", new.request_id) == new
    files.forget("acme")
    with pytest.raises(NotFound):
        files.find("acme", new.request_id)
