"""What goes over the socket: events byte by byte, errors before and after the head, disconnection, many streams at once."""

from __future__ import annotations

import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from cluster.errors import ContextLengthExceeded, Overloaded, ReplicaLost, Unavailable
from tests.deployments.gateway.conftest import Server, eventually, serving
from tests.fakes import KeyRing

CHAT = "/v1/chat/completions"


def body(text: str = "one two", **more: object) -> dict[str, object]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **more}


def test_events_are_framed_exactly(http: httpx.Client) -> None:
    answer = http.post(CHAT, json=body('é "\n\u2028', stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"].startswith("req_")
    head = re.match(
        rb'data: ({"id":"chatcmpl-[0-9a-f]{32}","object":"chat.completion.chunk","created":\d+,"model":"echo",)', answer.content
    )
    frames = [
        b'"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}',
        '"choices":[{"index":0,"delta":{"content":"é"},"logprobs":null,"finish_reason":null}]}'.encode(),
        '"choices":[{"index":0,"delta":{"content":" \\"\\n\u2028"},"logprobs":null,"finish_reason":null}]}'.encode(),
        b'"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}',
    ]
    assert answer.content == b"".join(b"data: " + head[1] + frame + b"\n\n" for frame in frames) + b"data: [DONE]\n\n"


def test_the_last_words_usage_and_done_leave_in_one_write(server: Server) -> None:
    server.models.delay_s = 0.05
    asked = json.dumps(body(stream=True, stream_options={"include_usage": True})).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KeyRing.USER}\r\nContent-Length: {len(asked)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode() + asked)
        received = b""
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += connection.recv(1 << 16)
    *_, last, end = received.split(b"data: [DONE]")[0].rpartition(b"\r\n")  # a chunk of HTTP is a write of the application
    assert last == b"\r\n"
    assert b'"finish_reason":"stop"' in end
    assert b'"usage":{' in end


def test_a_failure_before_the_first_token_is_a_plain_answer(server: Server, http: httpx.Client) -> None:
    server.models.error = ContextLengthExceeded("9 tokens, 8 fit", param="messages")
    for stream in (False, True):
        answer = http.post(CHAT, json=body(stream=stream))
        assert answer.status_code == 400
        assert answer.headers["content-type"] == "application/json"
        expected = {
            "message": "9 tokens, 8 fit",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "context_length_exceeded",
        }
        assert answer.json() == {"error": expected}


@pytest.mark.parametrize("fail_after", [1, 2])
def test_a_failure_in_mid_stream_is_an_error_event_and_no_done(server: Server, http: httpx.Client, fail_after: int) -> None:
    server.models.error, server.models.fail_after = ReplicaLost("the shard group died"), fail_after
    answer = http.post(CHAT, json=body(stream=True))
    assert answer.status_code == 200
    events = answer.text.split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert "[DONE]" not in answer.text
    with server.client() as client, pytest.raises(openai.APIError, match="shard group") as broken:
        list(client.chat.completions.create(**body(stream=True)))
    assert broken.value.code == "replica_lost"


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_ours_tells_nothing_but_the_request(server: Server, http: httpx.Client, stream: bool) -> None:
    server.models.error, server.models.fail_after = RuntimeError("/secret/path at 0x7f"), int(stream)
    answer = http.post(CHAT, json=body(stream=stream))
    assert answer.status_code == (200 if stream else 500)
    assert answer.headers["x-request-id"] in answer.text
    assert "secret" not in answer.text
    assert "Runtime" not in answer.text


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("full", retry_after_s=0.2), 503, openai.InternalServerError),
        (Unavailable("no replica", retry_after_s=7), 503, openai.InternalServerError),
    ],
)
def test_overload_says_when_to_come_back(
    server: Server, client: openai.OpenAI, error: Exception, status: int, kind: type[openai.APIStatusError]
) -> None:
    server.models.error = error
    with pytest.raises(kind) as refused:
        client.chat.completions.create(**body(stream=True))
    assert refused.value.status_code == status
    assert int(refused.value.response.headers["retry-after"]) in (1, 7)


def test_a_full_gateway_refuses_at_once_but_answers_probes() -> None:
    with serving(max_ongoing=1) as server, server.http() as http:
        server.models.delay_s = 30
        with http.stream("POST", CHAT, json=body(stream=True)) as running:
            events = running.iter_bytes()  # dropping the iterator would hang up
            next(events)
            refused = http.post(CHAT, json=body())
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert refused.headers["retry-after"] == "1"
            assert http.get("/health").status_code == 200
        eventually(lambda: server.models.open == 0)
        server.models.delay_s = 0
        assert http.post(CHAT, json=body()).status_code == 200


def test_an_answer_has_a_deadline() -> None:
    with serving(max_stream_s=0.3) as server, server.http() as http:
        server.models.first_delay_s = 30
        late = http.post(CHAT, json=body())
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert http.post(CHAT, json=body(stream=True)).status_code == 504
        server.models.first_delay_s, server.models.delay_s = 0, 30
        broken = http.post(CHAT, json=body(stream=True))
        assert broken.status_code == 200
        assert "deadline_exceeded" in broken.text
        eventually(lambda: server.models.open == 0)


def test_silence_is_filled_with_comments_that_clients_skip() -> None:
    with serving(keepalive_s=0.05) as server, server.http() as http, server.client() as client:
        server.models.first_delay_s = 0.3
        text = http.post(CHAT, json=body(stream=True)).text
        assert text.startswith(": keepalive\n\n")
        assert text.endswith("data: [DONE]\n\n")
        chunks = list(client.chat.completions.create(**body(stream=True)))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "one two"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("silent", [False, True])
def test_hanging_up_frees_the_model(server: Server, stream: bool, silent: bool) -> None:
    server.models.first_delay_s, server.models.delay_s = (60, 0) if silent else (0, 60)
    raw = json.dumps(body(stream=stream)).encode()
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {KeyRing.USER}\r\nContent-Length: {len(raw)}\r\n\r\n"
        connection.sendall(head.encode() + raw)
        eventually(lambda: server.models.open == 1)
    eventually(lambda: server.models.open == 0)


def test_concurrent_streams_never_cross(server: Server) -> None:
    server.models.delay_s = 0.002

    def one(number: int) -> None:
        nonce = " ".join(f"{number}-{i}" for i in range(20))
        with server.client() as client:
            chunks = list(client.chat.completions.create(**body(nonce, stream=True)))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == nonce
        assert len({c.id for c in chunks}) == 1

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(one, range(32)))


def test_an_answer_that_ends_early_is_an_error_not_a_short_answer(
    server: Server, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests import fakes

    whole = fakes.echo_chunks
    monkeypatch.setattr(fakes, "echo_chunks", lambda request: list(whole(request))[:-1])
    assert http.post(CHAT, json=body()).json()["error"]["code"] == "replica_lost"
    text = http.post(CHAT, json=body(stream=True)).text
    assert "replica_lost" in text
    assert "[DONE]" not in text
