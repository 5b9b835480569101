from __future__ import annotations

import json
from email.parser import BytesParser
from pathlib import Path

import pytest

from cluster import ingress, raynode, settings


@pytest.fixture
def loaded(tmp_path: Path) -> settings.Settings:
    return settings.load(home=tmp_path / "home")


def test_hard_stop_outlives_the_longest_stream(tmp_path: Path) -> None:
    loaded = settings.load(home=tmp_path, gateway={"max_stream_s": 1000})
    assert int(ingress.environment(loaded, tmp_path)["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > 1000


def test_every_variable_is_one_that_the_installed_serve_reads(loaded: settings.Settings, tmp_path: Path) -> None:
    from ray.serve._private import constants

    source = Path(constants.__file__).read_text()
    assert [name for name in ingress.environment(loaded, tmp_path) if f'"{name}"' not in source] == []


def test_without_haproxy_the_python_proxy_binds_the_gateways_address(tmp_path: Path) -> None:
    loaded = settings.load(home=tmp_path, gateway={"haproxy": False, "host": "192.0.2.7"})
    assert ingress.environment(loaded, tmp_path)["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert ingress.http_options(loaded) == {"host": "192.0.2.7", "port": 8000}


def test_behind_haproxy_replicas_stay_on_loopback_even_if_the_gateway_is_public(tmp_path: Path) -> None:
    loaded = settings.load(home=tmp_path, gateway={"host": "0.0.0.0"})
    if not ingress.uses_haproxy(loaded):
        pytest.skip("no HAProxy for this system")
    assert ingress.http_options(loaded)["host"] == "127.0.0.1"


def test_haproxys_sockets_fit_their_paths(loaded: settings.Settings) -> None:
    """HAProxy binds NAME.PID.tmp below a directory named after Ray's node id (56 characters)."""
    directory = Path(
        ingress.environment(loaded, raynode.temporary_directory(loaded) / "in")["RAY_SERVE_HAPROXY_SOCKET_PATH"]
    ).parent
    assert len(str(directory / ("n" * 56) / "prometheus.sock.4194304.tmp")) <= 107


def test_errors_of_the_ingress_are_whole_answers_in_the_api_envelope(loaded: settings.Settings, tmp_path: Path) -> None:
    if not ingress.uses_haproxy(loaded):
        pytest.skip("no HAProxy for this system")
    ingress.install(loaded, tmp_path)
    for status in (502, 503, 504):
        head, body = (tmp_path / "errors" / f"{status}.http").read_bytes().split(b"\r\n\r\n")
        line, headers = head.split(b"\r\n", 1)
        assert line.startswith(f"HTTP/1.1 {status} ".encode())
        parsed = BytesParser().parsebytes(headers)
        assert int(parsed["Content-Length"]) == len(body)
        assert (parsed["Retry-After"] == "1") is (status == 503)
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_workers_get_an_allowlisted_environment(loaded: settings.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("MMAAS_DATABASE_URL", "postgresql+psycopg://u:hidden@h/d")
    monkeypatch.setenv("HF_HOME", "/models")
    environment = raynode.head_environment(loaded)
    assert "hidden" not in " ".join(environment.values())
    assert environment["HF_HOME"] == "/models"
    assert environment["RAY_AUTH_MODE"] == "token"
    assert Path(environment["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o777 == 0o600


def test_a_version_that_stays_is_the_one_that_was_said() -> None:
    from ray import serve

    deployment = serve.deployment(name="kept", user_config={"files": "old"})(type("Kept", (), {}))
    changed = deployment.options(user_config={"files": "new"})
    assert [ingress.versioned(one, "7").version for one in (deployment, changed)] == ["7", "7"]
    assert ingress.versioned(changed, "7").user_config == {"files": "new"}
