"""Every check of `mmaas doctor --security`, in front of what is in order and of what somebody put there to be found."""

from __future__ import annotations

import contextlib
import datetime
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.types import Receive, Scope, Send
from typer.testing import CliRunner
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cluster import security, settings
from cluster.outside import NOTHING, Door
from cluster.private_files import Secrets
from cluster.settings import GatewaySettings
from cluster.types import Principal
from deployments.gateway.app import build_app
from mmaas.cli import app as command_line
from tests.deployments.gateway.conftest import Server, serving
from tests.deployments.gateway.sockets import Noting, address
from tests.deployments.gateway.whole import whole
from tests.fakes import EchoModels, KeyRing
from tests.free_ports import free_ports, free_run


def door(server: Server) -> Door:
    return Door(*address(server.url))


def statuses(checks: list[security.Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


@contextlib.contextmanager
def answering(status_of: Callable[[str, str, dict[str, str]], int]) -> Iterator[Door]:
    """A small server that answers with what a function of method, path and headers says."""

    class Handler(BaseHTTPRequestHandler):
        def __getattr__(self, name: str) -> Callable[[], None]:
            if name.startswith("do_"):
                return self.reply
            raise AttributeError(name)

        def reply(self) -> None:
            self.send_response(status_of(self.command, self.path, {key.lower(): value for key, value in self.headers.items()}))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Door("127.0.0.1", server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()


async def open_door(scope: Scope, receive: Receive, send: Send) -> None:
    """Says yes to everybody, obeys Serve's headers, and tells where it lives."""
    headers = dict(scope["headers"])
    status = 408 if b"x-request-timeout-seconds" in headers else 200
    document = {"paths": {"/v1/models": {"get": {}}, "/health": {"get": {}}}}
    body = json.dumps(document).encode() if scope["path"] == "/openapi.json" else b'Traceback: File "/usr/lib/x.py"'
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


def test_our_gateway_passes_every_check(tmp_path: Path) -> None:
    with whole(tmp_path) as gateway:
        found = security.check_gateway(door(gateway.server))
    assert [check for check in found if check.status != "ok"] == []
    assert len(found) == 8


def test_every_check_of_the_gateway_finds_an_open_door() -> None:
    """One of uvicorn's parsers takes ambiguous lengths, the other any number of Hosts."""
    found = set()
    for wire in ("h11", HttpToolsProtocol):
        with serving(app=open_door, wire=wire) as server:
            found |= {check.name for check in security.check_gateway(door(server)) if check.status == "fail"}
    assert len(found) == 8


def test_a_gateway_that_takes_any_key_is_found() -> None:
    def anybody(_: str) -> Principal:
        return Principal("acme", "k", frozenset({"inference"}))

    with serving(app=build_app(EchoModels(), anybody, GatewaySettings())) as server:
        assert security.check_anonymous(door(server)).status == "fail"


def test_a_key_that_everybody_knows_is_found() -> None:
    with serving() as server:
        server.keys.principals["sk-1234"] = Principal("acme", "k", frozenset({"inference"}))
        check = security.check_weak_keys(door(server))
    assert check.status == "fail"
    assert "sk-1234" in check.seen


def test_missing_headers_and_a_servers_name_are_found() -> None:
    with serving(wire=HttpToolsProtocol) as server:
        check = security.check_headers(door(server).ask("GET", "/health"))
    assert (check.status, "server: uvicorn" in check.seen) == ("fail", True)
    assert security.check_headers(NOTHING).status == "fail"


def test_serves_pages_are_found() -> None:
    with serving(app=Noting(build_app(EchoModels(), KeyRing().verify, GatewaySettings()))) as server:
        assert security.check_serve_pages(door(server)).status == "fail"


def test_a_door_to_the_inside_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert security.check_reach(["127.0.0.1"], [port], set()).status == "fail"
        assert security.check_reach(["127.0.0.1"], [port], {port}).status == "ok"
    assert security.check_reach(["127.0.0.1"], [port], set()).status == "ok"
    assert all(not address.startswith("127.") for address in security._outer_addresses())


def test_keys_in_clear_on_the_network_are_found(tmp_path: Path) -> None:
    with serving() as server:
        assert security.check_tls(door(server), public=True).status == "fail"
        assert security.check_tls(door(server), public=False).status == "ok"
    with over_tls(tmp_path) as secret:
        assert security.check_tls(secret, public=True).status == "ok"


@contextlib.contextmanager
def over_tls(directory: Path) -> Iterator[Door]:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    pem = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (directory / "both.pem").write_bytes(private + pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "both.pem")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError), context.wrap_socket(listener.accept()[0], server_side=True):
                pass

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield Door("127.0.0.1", listener.getsockname()[1])
        thread.join(5)


def test_ray_must_refuse_every_method() -> None:
    with answering(lambda method, path, headers: 200 if path == "/api/healthz" else 401) as ray:
        assert security.check_ray(ray).status == "ok"
    with answering(lambda method, path, headers: 200 if path == "/api/healthz" or method == "DELETE" else 401) as ray:
        check = security.check_ray(ray)
    assert (check.status, "DELETE /api/jobs/" in check.seen) == ("fail", True)
    with answering(lambda method, path, headers: 200 if "authorization" in headers or path == "/api/healthz" else 401) as ray:
        assert security.check_ray(ray).status == "fail"


def test_mlflow_must_know_its_own_name_and_run_nothing() -> None:
    def proper(method: str, path: str, headers: dict[str, str]) -> int:
        return 403 if headers["host"] == "evil.example" else 404 if "jobs" in path else 200

    with answering(proper) as mlflow:
        check = security.check_mlflow(mlflow)
        assert (check.status, "password" in check.seen) == ("warn", True)
    with answering(lambda method, path, headers: 404 if "jobs" in path else 200) as mlflow:
        assert security.check_mlflow(mlflow).status == "fail"
    with answering(lambda method, path, headers: 403 if headers["host"] == "evil.example" else 200) as mlflow:
        assert "jobs" in security.check_mlflow(mlflow).seen


@pytest.mark.parametrize(
    "opened",
    ["home", "home/secrets", "home/secrets/pepper", "home/library", "home/runs", "home/audit", "home/quickstart.json", "temporary"],
)
def test_a_file_that_others_can_read_is_found(tmp_path: Path, opened: str) -> None:
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    for directory in (home, temporary, home / "library", home / "runs", home / "audit"):
        directory.mkdir(mode=0o700)
    assert Secrets(home).pepper
    (home / "quickstart.json").touch(mode=0o600)
    (home / "mmaas.db").touch(mode=0o644)  # nobody gets there through a home of mode 0700
    assert security.check_files(home, temporary).status == "ok"
    path = tmp_path / opened
    path.chmod(0o755 if path.is_dir() else 0o644)
    assert opened in security.check_files(home, temporary).seen


def test_a_secret_that_can_be_guessed_is_found(tmp_path: Path) -> None:
    assert security.check_secrets(tmp_path).status == "ok"
    assert Secrets(tmp_path).ray_token_path.exists()
    assert security.check_secrets(tmp_path).status == "ok"
    for weak in ("pepper", "a" * 64, ""):
        (tmp_path / "secrets" / "pepper").write_text(weak)
        assert security.check_secrets(tmp_path).status == "fail"


def test_what_is_not_running_is_told_as_unchecked(tmp_path: Path) -> None:
    names = ("gcs_port", "dashboard_port", "client_port")
    free = free_ports(5)
    loaded = settings.load(
        home=tmp_path / "home",
        ray=dict(zip(names, free, strict=False)),
        mlflow={"port": free[3]},
        gateway={"port": free[4], "internal_port": free_run()},
    )
    found = statuses(security.examine(loaded))
    assert found["gateway"] == found["Ray token"] == found["MLflow"] == "warn"
    assert set(found) == {"reach", "TLS", "gateway", "Ray token", "MLflow", "files", "secrets"}


def test_the_command_writes_a_table_and_json_and_fails_with_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [security.Check("headers", "ok", "all there"), security.Check("files", "fail", "open", "chmod")]
    monkeypatch.setattr(security, "examine", lambda _: found)
    monkeypatch.setenv("MMAAS_HOME", str(tmp_path))
    shown = CliRunner().invoke(command_line, ["doctor", "--security", "--json"])
    assert [check["status"] for check in json.loads(shown.stdout)] == ["ok", "fail"]
    assert shown.exit_code == 1
    assert "chmod" in CliRunner().invoke(command_line, ["doctor", "--security"]).stdout
