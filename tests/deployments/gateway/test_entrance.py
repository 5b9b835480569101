"""Who gets in, with what, and what the gateway says of itself: keys, scopes, limits, control headers, records."""

from __future__ import annotations

import json
import logging
import re
import socket

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.gateway.app import router
from deployments.gateway.scopes import DOCUMENTATION, PUBLIC, ScopedRoute
from tests.deployments.gateway.conftest import Server, eventually, serving
from tests.fakes import KeyRing

CHAT = "/v1/chat/completions"
GOOD = {"model": "echo", "messages": [{"role": "user", "content": "one"}]}
PUBLIC_PATHS = {"/health", "/ready", "/openapi.json", "/docs", "/v2/health/live", "/v2/health/ready"}


def error_of(answer: httpx.Response) -> dict[str, object]:
    """The envelope, which must be whole on every answer that isn't a success."""
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def requests(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.message == "request"]


def test_every_route_but_the_public_ones_refuses_anonymous_callers(server: Server) -> None:
    paths = {route.path.replace("{model:path}", "echo"): route for route in router.routes}
    with server.http(key=None) as anonymous:
        for path, route in paths.items():
            assert isinstance(route, ScopedRoute)
            for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
                answer = anonymous.request(method, path)
                assert (answer.status_code != 401) == (path in PUBLIC_PATHS), (method, path)
        for path in (
            "/nowhere",
            "/v1",
            "/-/routes",
            "/-/healthz",
            "//health",
            "/health/",
            "/metrics",
            "/redoc",
            "/docs/oauth2-redirect",
        ):
            assert error_of(anonymous.get(path))["code"] == "invalid_api_key"
    assert {path for path, route in paths.items() if route.scope == PUBLIC} | DOCUMENTATION == PUBLIC_PATHS


def test_unknown_keys_are_refused_without_repeating_them(server: Server) -> None:
    with server.client("mk_wrong_key_000000000000") as client, pytest.raises(openai.AuthenticationError) as refused:
        client.models.list()
    assert refused.value.code == "invalid_api_key"
    assert "mk_wrong" not in str(refused.value)


@pytest.mark.parametrize(
    "value",
    ["Basic abc", "Bearer", "Bearer \x85", f"Token {KeyRing.USER}", "Bearer " + "x" * 5000, "Bearer a\tb", "Bearer \xff\xfe"],
)
def test_malformed_credentials_are_401(server: Server, value: str) -> None:
    before = server.keys.lookups
    with server.http(key=None) as anonymous:
        answer = anonymous.get("/v1/models", headers=[(b"authorization", value.encode("latin-1"))])
        assert answer.status_code == 401
        twice = [("authorization", f"Bearer {KeyRing.USER}")] * 2
        assert anonymous.get("/v1/models", headers=twice).status_code == 401
    assert server.keys.lookups == before


def test_scopes_are_checked(server: Server) -> None:
    with server.client("mk_no_scope_012345") as client, pytest.raises(openai.PermissionDeniedError):
        client.models.list()
    with server.http() as user, server.http(KeyRing.ADMIN) as admin:
        assert error_of(user.get("/metrics"))["code"] == "insufficient_permissions"
        text = admin.get("/metrics").text
    assert "mmaas_gateway_requests_total" in text
    assert KeyRing.USER not in text


def test_unknown_routes_methods_and_models_have_the_envelope(http: httpx.Client, client: openai.OpenAI) -> None:
    assert http.get("/v1/nothing").status_code == 404
    assert error_of(http.get("/v1/nothing"))["code"] == "not_found"
    assert http.get("/v1/models/").status_code == 404
    wrong = http.get(CHAT)
    assert (wrong.status_code, error_of(wrong)["code"]) == (405, "method_not_allowed")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=GOOD["messages"], stream=True)
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 400),
        (b"null", 400),
        (b"[]", 400),
        (b'"text"', 400),
        (b"{", 400),
        (b"{}x", 400),
        (b'{"a":NaN}', 400),
        (b'{"a":-Infinity}', 400),
        (b'{"temperature":1e400}', 400),
        (b'{"seed":' + b"9" * 5000 + b"}", 400),
        (b'{"seed":' + b"9" * 25 + b"}", 400),
        (b"[" * 200_000, 400),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, 400),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", 400),
        (b'{"model":"\\ud800","messages":[]}', 400),
        (b'{"model":"\xff"}', 400),
        (b"\x00\x01\x02", 400),
        (b'{"messages":' + b"[[]," * 100_000, 400),
        (b"x" * ((4 << 20) + 1), 413),
    ],
)
def test_hostile_bodies_are_refused(http: httpx.Client, raw: bytes, status: int) -> None:
    answer = http.post(CHAT, content=raw)
    assert answer.status_code == status
    error_of(answer)


def test_a_body_is_counted_by_what_arrives(http: httpx.Client) -> None:
    def dribble() -> object:
        for _ in range(70):
            yield b" " * 65536

    answer = http.post(CHAT, content=dribble())
    assert "content-length" not in answer.request.headers
    assert (answer.status_code, error_of(answer)["code"]) == (413, "payload_too_large")


def test_large_bodies_within_the_limit_are_read(server: Server, http: httpx.Client) -> None:
    text = "x" * (3 << 20)
    answer = http.post(CHAT, json={**GOOD, "messages": [{"role": "user", "content": text}]})
    assert answer.json()["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_the_content_type_of_a_json_body_does_not_matter(http: httpx.Client, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    assert http.post(CHAT, content=json.dumps(GOOD), headers=headers).status_code == 200


def test_encoded_bodies_are_refused(http: httpx.Client) -> None:
    assert http.post(CHAT, content=b"xx", headers={"content-encoding": "gzip"}).status_code == 400


@pytest.mark.parametrize("hosts", [b"", b"Host: a\r\nHost: b\r\n"])
def test_exactly_one_host(server: Server, hosts: bytes) -> None:
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n" + hosts + b"Connection: close\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"error"' in answer


def test_only_our_own_names_are_answered_where_they_are_said() -> None:
    with serving(names=("api.example.org", "127.0.0.1")) as server, server.http() as http:
        for host in ("api.example.org", "API.example.org:8000", "127.0.0.1"):
            assert http.get("/health", headers={"host": host}).status_code == 200
        for host in ("evil.example", "api.example.org.evil.example", "api.example.org:80:80", ":", "[::1]:8000"):
            refused = http.get("/health", headers={"host": host})
            assert (refused.status_code, error_of(refused)["code"]) == (421, "misdirected_request")


def test_request_ids_are_ours_and_unique(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="deployments")
    ids = [
        http.get("/health", headers={"x-request-id": b"mine\x85" if i else b"mine"}).headers.get_list("x-request-id")
        for i in range(50)
    ]
    assert len({own for (own,) in ids}) == 50
    assert all(re.fullmatch(r"req_[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}", own) for (own,) in ids)
    eventually(lambda: len(requests(caplog)) == 50)  # a record is written after its answer
    records = requests(caplog)
    assert {record.client_request_id for record in records} == {"mine", "mine?"}
    assert {record.request_id for record in records} == {own for (own,) in ids}


def test_records_tell_the_call_and_never_the_key(server: Server, http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    http.post(CHAT, json={**GOOD, "stream": True})
    http.post(CHAT, json={**GOOD, "model": KeyRing.ADMIN}, headers={"authorization": "Bearer mk_not_known_0001"})
    http.post(CHAT, content=b"{")
    eventually(lambda: len(requests(caplog)) == 3)
    done = requests(caplog)[0]
    assert (done.status, done.route, done.tenant, done.key_id, done.model) == (200, CHAT, "acme", "key_user", "echo")
    assert (done.prompt_tokens, done.completion_tokens) == (7, 1)
    everything = " ".join(str(vars(record)) for record in caplog.records)
    for key in (KeyRing.USER, "mk_not_known_0001"):
        assert key not in everything


def test_ready_says_which_models_answer(server: Server) -> None:
    with server.http(key=None) as anonymous:
        up = anonymous.get("/ready")
        assert (up.status_code, up.json()) == (200, {"ready": True, "models": {"echo": True}, "asleep": []})
        server.models.healthy = False
        down = anonymous.get("/ready")
        assert (down.status_code, down.json()["ready"]) == (503, False)
        server.models.deployments = []
        assert anonymous.get("/ready").status_code == 503


def test_the_document_describes_requests_and_answers(server: Server) -> None:
    with server.http(key=None) as anonymous:
        document = anonymous.get("/openapi.json").json()
    chat = document["paths"][CHAT]["post"]
    fields = chat["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"messages", "temperature", "stream_options", "logit_bias", "top_logprobs"} <= set(fields)
    answer = chat["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].rsplit("/")[-1]
    assert "usage" in document["components"]["schemas"][answer]["properties"]
    references = re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(document))
    assert set(references) <= set(document["components"]["schemas"])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = [
    "model",
    "messages",
    "prompt",
    "n",
    "stop",
    "temperature",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "seed",
    "echo",
]
FIELDS += [
    "logit_bias",
    "tools",
    "tool_choice",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_choice",
    "best_of",
    "top_k",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from([CHAT, "/v1/completions"]),
    start=st.sampled_from([GOOD, {"model": "echo", "prompt": "one"}, {}]),
    change=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4),
)
def test_no_body_is_a_fault_of_ours(
    server: Server, http: httpx.Client, path: str, start: dict[str, object], change: dict[str, object]
) -> None:
    answer = http.post(path, json={**start, **change})
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        error_of(answer)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=200))
def test_no_bytes_are_a_fault_of_ours(server: Server, http: httpx.Client, raw: bytes) -> None:
    assert http.post(CHAT, content=raw).status_code == 400
