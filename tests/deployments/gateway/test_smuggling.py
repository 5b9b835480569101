"""Requests that two readers could read differently: what one takes for a body must never become a request of its own.

The same suite goes to our server alone and through a real HAProxy with the configuration that we run it with. It is aimed at
uvicorn's other parser, too, where it must find what is wrong there.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import httpx
import pytest

from cluster import ingress, settings
from tests.cluster.test_haproxy import rendered_by_serve
from tests.deployments.gateway.conftest import eventually, serving
from tests.deployments.gateway.sockets import Address, Noting, address, answer
from tests.deployments.gateway.whole import whole
from tests.fakes import EchoModels, KeyRing
from tests.free_ports import free_port

CANARY = b"GET /canary HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer " + KeyRing.USER.encode() + b"\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: a\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
END = b"0\r\n\r\n" + CANARY  # an end of chunks, and what follows for a reader who counts in chunks


def length(body: bytes) -> bytes:
    return b"Content-Length: %d\r\n" % len(body)


def both(transfer: bytes) -> bytes:
    """A length that covers the canary, and a transfer coding of a doubtful kind after which it would stand alone."""
    return POST + length(END) + transfer + b"\r\n" + END


AMBIGUOUS: dict[str, bytes] = {
    "length, then chunked": both(CHUNKED),
    "chunked, then length": POST + CHUNKED + length(END) + b"\r\n" + END,
    "chunked and a short length": POST
    + b"Content-Length: 4\r\n"
    + CHUNKED
    + b"\r\n%x\r\n" % len(CANARY)
    + CANARY
    + b"\r\n0\r\n\r\n",
    "an unknown coding": both(b"Transfer-Encoding: xchunked\r\n"),
    "chunked twice": both(CHUNKED + CHUNKED),
    "chunked and identity": both(CHUNKED + b"Transfer-Encoding: identity\r\n"),
    "identity after chunked": both(b"Transfer-Encoding: chunked, identity\r\n"),
    "identity before chunked": both(b"Transfer-Encoding: identity, chunked\r\n"),
    "a space before the colon": both(b"Transfer-Encoding : chunked\r\n"),
    "a tab before the colon": both(b"Transfer-Encoding\t: chunked\r\n"),
    "a vertical tab in the value": both(b"Transfer-Encoding:\x0bchunked\r\n"),
    "a form feed after the value": both(b"Transfer-Encoding: chunked\x0c\r\n"),
    "quotes": both(b'Transfer-Encoding: "chunked"\r\n'),
    "a folded line": both(b"Transfer-Encoding:\r\n chunked\r\n"),
    "a folded line of another header": both(b"X: y\r\n Transfer-Encoding: chunked\r\n"),
    "a bare line feed": both(b"X: y\nTransfer-Encoding: chunked\r\n"),
    "a bare carriage return": both(b"X: y\rTransfer-Encoding: chunked\r\n"),
    "a zero byte in a value": both(b"X: \x00\r\nTransfer-Encoding: chunked\r\n"),
    "a zero byte in a name": both(b"X\x00: y\r\nTransfer-Encoding: chunked\r\n"),
    "a space in a name": both(b"X y: z\r\nTransfer-Encoding: chunked\r\n"),
    "a line without a colon": both(b"nothing\r\nTransfer-Encoding: chunked\r\n"),
    "an empty name": both(b": x\r\nTransfer-Encoding: chunked\r\n"),
    "a high byte in a name": both(b"\xffX: y\r\nTransfer-Encoding: chunked\r\n"),
    "two lengths": POST + b"Content-Length: 0\r\n" + length(CANARY) + b"\r\n" + CANARY,
    "one length twice": POST + length(CANARY) + length(CANARY) + b"\r\n" + CANARY,
    "a list of lengths": POST + b"Content-Length: 0, %d\r\n\r\n" % len(CANARY) + CANARY,
    "a length with a sign": POST + b"Content-Length: +0\r\n\r\n" + CANARY,
    "a negative length": POST + b"Content-Length: -1\r\n\r\n" + CANARY,
    "a length in hexadecimal": POST + b"Content-Length: 0x0\r\n\r\n" + CANARY,
    "a length with an underscore": POST + b"Content-Length: 0_0\r\n\r\n" + CANARY,
    "a length with letters": POST + b"Content-Length: 0a\r\n\r\n" + CANARY,
    "a length beyond 64 bits": POST + b"Content-Length: 18446744073709551616\r\n\r\n" + CANARY,
    "no length but the word": POST + b"Content-Length:\r\n\r\n" + CANARY,
    "a chunk with a sign": POST + CHUNKED + b"\r\n+0\r\n\r\n" + CANARY,
    "a negative chunk": POST + CHUNKED + b"\r\n-1\r\n\r\n" + CANARY,
    "a chunk with a prefix": POST + CHUNKED + b"\r\n0x0\r\n\r\n" + CANARY,
    "a chunk beyond 64 bits": POST + CHUNKED + b"\r\n10000000000000000\r\n\r\n" + CANARY,
    "a chunk without a size": POST + CHUNKED + b"\r\n;x\r\n\r\n" + CANARY,
    "a chunk line with a bare line feed": POST + CHUNKED + b"\r\n2\nab\r\n0\r\n\r\n" + CANARY,
    "a chunk extension with a bare line feed": POST + CHUNKED + b"\r\n2;\nab\r\n0\r\n\r\n" + CANARY,
    "a chunk longer than its size": POST + CHUNKED + b"\r\n2\r\nabcd0\r\n\r\n" + CANARY,
    "a chunk without its end of line": POST + CHUNKED + b"\r\n2\r\nab0\r\n\r\n" + CANARY,
    "chunks in HTTP/1.0": POST.replace(b"HTTP/1.1", b"HTTP/1.0") + CHUNKED + b"\r\n" + END,
    "a space before the request": b" " + GET + b"\r\n" + CANARY,
    "a header before the first": b"GET /health HTTP/1.1\r\n X: y\r\nHost: a\r\n\r\n" + CANARY,
    "another version": GET.replace(b"HTTP/1.1", b"HTTP/11.1") + b"\r\n" + CANARY,
    "version two": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + CANARY,
    "no version": b"GET /health\r\n\r\n" + CANARY,
    "two spaces in the request": b"GET /health x HTTP/1.1\r\nHost: a\r\n\r\n" + CANARY,
    "another method": b"GE\x00T /health HTTP/1.1\r\nHost: a\r\n\r\n" + CANARY,
    "a tunnel": b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n" + CANARY,
}
"""Nobody may guess: these are refused, and the connection is closed."""

BODIES: dict[str, bytes] = {
    "a GET with a body": GET + length(CANARY) + b"\r\n" + CANARY,
    "a GET with chunks": GET + CHUNKED + b"\r\n%x\r\n" % len(CANARY) + CANARY + b"\r\n0\r\n\r\n",
    "a refused POST": b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n" + length(CANARY) + b"\r\n" + CANARY,
    "an upgrade": POST + b"Connection: upgrade\r\nUpgrade: h2c\r\n" + length(CANARY) + b"\r\n" + CANARY,
    "a body that was announced": POST + b"Expect: 100-continue\r\n" + length(CANARY) + b"\r\n" + CANARY,
    "a chunk with an extension": POST + CHUNKED + b"\r\n%x;a=b\r\n" % len(CANARY) + CANARY + b"\r\n0\r\n\r\n",
    "no path that was asked": GET.replace(b"/health", b"/%0d%0aGET%20/canary") + b"\r\n",
}
"""Unusual and in order: the canary is a body, and stays one."""


def reached(to: Address, noting: Noting) -> list[str]:
    """The cases by which the canary became a request, or that were answered as if they were in order."""
    found = []
    for name, request in {**AMBIGUOUS, **BODIES}.items():
        noting.paths.clear()
        received, closed = answer(to, request, 0.3)
        if "/canary" in noting.paths or b"/canary" in received:
            found.append(f"{name}: reached")
        elif name in AMBIGUOUS and not (closed and (not received or received.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")))):
            found.append(f"{name}: {received[:40]!r}, {closed=}")
        if received.count(b"HTTP/1.1 ") > 1 + received.count(b"HTTP/1.1 100 "):
            found.append(f"{name}: {received.count(b'HTTP/1.1 ')} answers")
    return found


@pytest.fixture(scope="module")
def models() -> EchoModels:
    return EchoModels()


@pytest.fixture(scope="module")
def noting(models: EchoModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Noting]:
    with whole(tmp_path_factory.mktemp("smuggling"), models=models, verify=KeyRing().verify) as gateway:
        yield Noting(gateway.app)


@pytest.fixture(scope="module")
def alone(noting: Noting) -> Iterator[str]:
    with serving(app=noting) as server:
        yield server.url


@pytest.fixture(scope="module")
def behind_haproxy(noting: Noting, alone: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The configuration that Serve writes and we tighten, with a second or two in the place of longer times."""
    binary, path = ingress.haproxy_binary(), tmp_path_factory.mktemp("haproxy")
    if binary is None:
        pytest.skip("no HAProxy for this system")
    port = free_port()
    ingress.install(settings.load(home=path / "home", gateway={"port": port}), path)
    text = rendered_by_serve(path).replace("127.0.0.1:30001", f"127.0.0.1:{address(alone)[1]}")
    (path / "haproxy.cfg").write_text(text)
    program = (path / "haproxy").read_text().replace(str(binary), str(path / "quick"))
    (path / "haproxy").write_text(program)
    shorter = ("s/timeout http-request 10s/timeout http-request 1s/", "s/timeout client .*/timeout client 2s/")
    quick = f"sed -i '{';'.join(shorter)}' {path}/haproxy.cfg"
    (path / "quick").write_text(f'#!/bin/sh\n{quick}\nexec {binary} "$@"\n')
    (path / "quick").chmod(0o700)
    with (path / "log").open("w") as log:
        process = subprocess.Popen([path / "haproxy", "-db", "-f", path / "haproxy.cfg"], stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: status(f"{url}/health") == 200, 20)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def status(url: str) -> int:
    try:
        return httpx.get(url, trust_env=False).status_code
    except httpx.HTTPError:
        return 0


def test_no_body_becomes_a_request(alone: str, noting: Noting) -> None:
    assert reached(address(alone), noting) == []
    assert status(f"{alone}/health") == 200
    assert len(AMBIGUOUS) + len(BODIES) >= 40


def test_no_body_becomes_a_request_behind_haproxy(behind_haproxy: str, noting: Noting) -> None:
    """HAProxy may repair what is safe to repair; what it passes on, our server must read as it does."""
    found = reached(address(behind_haproxy), noting)
    assert [case for case in found if case.endswith("reached")] == []
    assert status(f"{behind_haproxy}/health") == 200


def test_the_suite_finds_what_is_wrong_with_the_other_parser(noting: Noting) -> None:
    with serving(app=noting, wire="h11") as server:
        found = reached(address(server.url), noting)
    assert any(case.endswith("reached") for case in found)


def test_serves_own_pages_are_for_nobody_outside(behind_haproxy: str) -> None:
    for path in ("/-/routes", "/-/healthz", "/%2d/routes", "/%2D/healthz", "/-/ROUTES", "/-%2froutes"):
        received, _ = answer(address(behind_haproxy), f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode(), 5)
        assert received.startswith(b"HTTP/1.1 404 "), (path, received)
        assert b'{"error": {' in received


def test_haproxy_takes_the_names_of_servers_and_of_serves_headers_away(behind_haproxy: str, noting: Noting) -> None:
    answered = httpx.get(
        f"{behind_haproxy}/health", headers={"x_session_id": "a", "x-serve-x": "b", "x-ray-y": "c"}, trust_env=False
    )
    assert "server" not in answered.headers
    assert answered.headers["x-content-type-options"] == "nosniff"


def test_haproxy_ends_heads_that_take_too_long(behind_haproxy: str) -> None:
    began = time.monotonic()
    received, closed = answer(address(behind_haproxy), b"GET /health HTTP/1.1\r\nX: ", 8)
    assert closed
    assert time.monotonic() - began < 7
    assert received[:12] in (b"", b"HTTP/1.1 408")


def test_a_caller_who_waits_for_a_long_answer_is_not_taken_for_a_slow_one(behind_haproxy: str, models: EchoModels) -> None:
    models.first_delay_s = 4.0  # twice what a caller may be silent for
    try:
        asked = {"model": "echo", "prompt": "one"}
        headers = {"Authorization": f"Bearer {KeyRing.USER}"}
        answered = httpx.post(f"{behind_haproxy}/v1/completions", json=asked, headers=headers, timeout=20, trust_env=False)
    finally:
        models.first_delay_s = 0.0
    assert answered.status_code == 200
