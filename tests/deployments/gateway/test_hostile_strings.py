"""Every string that the API takes, with three hundred hostile ones in it: nothing is opened, started or evaluated, nothing leaks.

An audit hook of the interpreter sees what the process opens and starts while it answers. Three planted bugs are found.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import jinja2
import pytest
from starlette.requests import Request
from starlette.responses import Response

from cluster.settings import GatewaySettings
from deployments.gateway.app import build_app
from deployments.gateway.protocols import is_open_inference
from deployments.gateway.scopes import ScopedRoute, requires
from tests.deployments.gateway.conftest import Server, serving
from tests.deployments.gateway.hostile import LEAKS, PRODUCT, Place, corpus, places, targets, with_string
from tests.deployments.gateway.sockets import address, answer
from tests.deployments.gateway.whole import OPERATIONS, Whole, document, whole
from tests.fakes import EchoModels, KeyRing

WATCHED = ("open", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")

Call = Callable[[Place], tuple[str, Mapping[str, str]]]
"""The key for a place, and what stands in its path beside it."""


@dataclass
class Watch:
    """What this process opens and starts while `is_on`, but for modules that Python loads late."""

    is_on: bool = False
    events: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_on and event in WATCHED and not str(arguments[0]).endswith((".py", ".pyc", ".so")):
            self.events.append(f"{event} {arguments[0]!r}")


WATCH = Watch()
sys.addaudithook(WATCH)  # can't be taken back, so it stays for the process and looks away


@dataclass
class Attack:
    """One connection on which requests follow each other; notes what is wrong with the answers."""

    server: Server
    documented: dict[tuple[str, str], set[int]]
    call: Call
    found: list[str] = field(default_factory=list)
    sent: int = 0

    def run(self, asked: Iterator[tuple[Place, str]]) -> list[str]:
        WATCH.events.clear()
        with contextlib.ExitStack() as stack:
            connection, WATCH.is_on = None, True
            try:
                for place, text in asked:
                    for request in requests(place, text, *self.call(place)):
                        connection = connection or stack.enter_context(socket.create_connection(address(self.server.url), 20))
                        connection.sendall(request)
                        status, body, stays = read(connection)
                        self.check(place, text, status, body)
                        self.sent += 1
                        connection = connection if stays else None
            finally:
                WATCH.is_on = False
        self.found += dict.fromkeys(WATCH.events)
        return self.found

    def check(self, place: Place, text: str, status: int, body: bytes) -> None:
        said = body.decode(errors="replace")
        if status not in self.documented[place.method, place.path] and status not in (404, 405, 431):
            self.found.append(f"{place}: {text[:40]!r}: {status}")
        if status >= 400 and not is_refusal(said, place.path):
            self.found.append(f"{place}: {text[:40]!r}: no envelope in {said[:80]!r}")
        if status >= 400 and (leak := LEAKS.search(without(text[:256], unescaped(said)))):
            self.found.append(f"{place}: {text[:40]!r}: says {leak[0]!r}")
        if PRODUCT in said:
            self.found.append(f"{place}: {text[:40]!r} was evaluated")


def requests(place: Place, text: str, key: str, others: Mapping[str, str]) -> Iterator[bytes]:
    headers = f"Host: a\r\nAuthorization: Bearer {key}\r\n"
    body = json.dumps(with_string(place, text)).encode(errors="surrogatepass") if place.kind == "body" else b""
    if place.kind == "header":
        headers += f"{place.name}: {text if re.fullmatch(r'[ -~]*', text) else quote(text)}\r\n"
    beside = [targets(place, "", others)[0].partition("?")[0]]
    for target in targets(place, text, others) if place.kind in ("path", "query") else beside:
        yield f"{place.method} {target} HTTP/1.1\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def read(connection: socket.socket) -> tuple[int, bytes, bool]:
    """One answer: status, body, and whether the connection goes on."""
    received = more(connection, b"", lambda so_far: b"\r\n\r\n" in so_far)
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    lengths = [int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")]
    if lengths:
        body = more(connection, body, lambda so_far: len(so_far) >= lengths[0])
    elif b"transfer-encoding: chunked" in lines:
        body = more(connection, body, lambda so_far: so_far.endswith(b"0\r\n\r\n"))
    return int(head[9:12]), body, b"connection: close" not in lines


def more(connection: socket.socket, received: bytes, is_enough: Callable[[bytes], bool]) -> bytes:
    while not is_enough(received):
        data = connection.recv(1 << 16)
        assert data, f"closed after {received[-80:]!r}"
        received += data
    return received


def is_refusal(said: str, path: str) -> bool:
    """OpenAI's envelope; under /v2 a string is enough."""
    try:
        error = json.loads(said)["error"]
        return is_open_inference(path) or set(error) == {"message", "type", "param", "code"}
    except (ValueError, KeyError, TypeError):
        return False


def unescaped(said: str) -> str:
    try:
        error = json.loads(said)["error"]
        return error if isinstance(error, str) else " ".join(str(value) for value in error.values())
    except (ValueError, KeyError, TypeError):
        return said


def without(text: str, said: str) -> str:
    """A caller's own word may be told back, as it is, as Python writes it, or as a path or query says it; its beginning too."""
    for own in (text, repr(text)[1:-1], unquote(text), repr(unquote(text))[1:-1]):
        for told in (own, own[:64]):
            said = said.replace(told, "") if told else said
    return said


def documented(document: dict[str, Any]) -> dict[tuple[str, str], set[int]]:
    return {
        (method.upper(), path): {int(status) for status in operation["responses"] if status != "500"}
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }


def dealt(all_places: Sequence[Place], strings: Sequence[str], each: int) -> Iterator[tuple[Place, str]]:
    """`each` strings to every place, other ones to each, so that all of both come."""
    for number, place in enumerate(all_places):
        for step in range(each):
            yield place, strings[(number * each + step) % len(strings)]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    with whole(tmp_path_factory.mktemp("hostile")) as gateway:
        yield gateway


def by_a_tenant(gateway: Whole) -> Call:
    """Everything with the key for it, and objects that exist beside the string."""
    tenant, known = gateway.tenant(), {(one.method, one.path): one for one in OPERATIONS}

    def call(place: Place) -> tuple[str, Mapping[str, str]]:
        operation = known[place.method, place.path]
        ids = {name: tenant.ids[kind] for name, kind in zip(operation.parameters, operation.kinds, strict=True)}
        return gateway.key(operation, tenant), {} if place.kind == "header" else ids  # which may do what the path says

    return call


def attack(server: Server, document: Mapping[str, Any], call: Call, each: int) -> Attack:
    document = json.loads(json.dumps(document))
    with server.http(KeyRing.ADMIN) as http:
        http.get("/v1/models")  # what is imported late is imported
    going = Attack(server, documented(document), call)
    going.run(dealt(places(document), corpus(), each))
    return going


def test_places_are_found_wherever_strings_are_taken() -> None:
    found = {str(place) for place in places(document())}
    for expected in (
        "GET /v1/models/{model} path model",
        "POST /v1/models/{model}/sleep path model",
        "POST /v1/chat/completions body ('model',)",
        "POST /v1/chat/completions body ('messages', 0, 'content')",
        "POST /v1/chat/completions body ('tools', 0, 'function', 'name')",
        "POST /v1/completions body ('stop', 0)",
        "POST /v1/completions body ('guided_regex',)",
        "POST /v1/rerank body ('query',)",
        "POST /v1/organization/invites body ('projects', 0, 'role')",
        "GET /v1/organization/audit_logs query event_types[]",
        "DELETE /v1/projects/{project_id}/users/{holder_id}/roles/{role_id} path role_id",
        "POST /v2/models/{model}/infer body ('inputs', 0, 'name')",
    ):
        assert expected in found
    assert len(found) > 200
    assert len(set(corpus())) >= 300


def test_hostile_strings_are_only_strings(gateway: Whole) -> None:
    going = attack(gateway.server, document(), by_a_tenant(gateway), each=6)
    assert going.found[:10] == []
    assert going.sent > 1000
    assert not Path("/tmp/mmaas-hostile").exists()


@pytest.mark.slow
@pytest.mark.skipif("FUZZ_EXAMPLES" not in os.environ, reason="takes half an hour: make fuzz")
@pytest.mark.timeout(7200)
def test_every_hostile_string_in_every_place(gateway: Whole) -> None:
    going = attack(gateway.server, document(), by_a_tenant(gateway), each=len(corpus()))
    assert going.found[:10] == []
    assert not Path("/tmp/mmaas-hostile").exists()


def test_hostile_credentials_are_refused_before_any_look_up() -> None:
    with serving() as server:
        for text in corpus():
            value = text.encode("utf-8", "surrogatepass").replace(b"\r", b"").replace(b"\n", b"").replace(b"\x00", b"")
            head = b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\nAuthorization: Bearer " + value + b"\r\n\r\n"
            received, _ = answer(address(server.url), head, 5)
            assert received[9:12] in (b"401", b"400"), text
        assert server.keys.lookups < len(corpus())


@requires("inference")
async def opens(request: Request, name: str) -> Response:
    try:
        with open(Path("/nowhere", name), "rb") as file:  # noqa: ASYNC230
            return Response(file.read(64))  # /dev/zero has no end
    except (OSError, ValueError):
        return Response(status_code=404, content=b'{"error":{"message":"","type":"","param":null,"code":null}}')


@requires("inference")
async def evaluates(request: Request, name: str) -> Response:
    return Response(jinja2.Template("{{1337*7331}}").render() if name.startswith("{{1337") else name.encode())


@requires("inference")
async def tells(request: Request, name: str) -> Response:
    return Response(status_code=400, content=json.dumps({"error": {"message": __file__, "type": "", "param": None, "code": None}}))


@pytest.mark.parametrize(("planted", "sign"), [(opens, "open "), (evaluates, "was evaluated"), (tells, "says ")])
def test_a_planted_bug_is_found(planted: Any, sign: str) -> None:
    app = build_app(EchoModels(), KeyRing().verify, GatewaySettings())
    app.router.routes[:] = [ScopedRoute("/v1/planted/{name:path}", planted, methods=["GET"])]
    with serving(app=app) as server:
        found = attack(server, app.openapi(), lambda _: (KeyRing.ADMIN, {}), each=len(corpus())).found
    assert any(sign in problem for problem in found)
