from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import haproxy, ingress, settings

CONFIG = """global
    stats socket /run/admin.sock mode 666 level admin expose-fd listeners
    hard-stop-after 660s
defaults
    mode http
    errorfile 503 /run/500.http
frontend prometheus
    bind :9101
frontend http_frontend
    bind *:8000
    use_backend app
backend app
    server one 127.0.0.1:30001 check
listen stats
  bind *:8404
  stats enable
"""


def binds(config: str) -> list[str]:
    return re.findall(r"^\s*bind (\S+)", config, re.MULTILINE)


def test_only_the_front_stays_on_the_network() -> None:
    tight = haproxy.tighten(CONFIG, "127.0.0.1:8000", "/run", {})
    assert binds(tight) == ["unix@/run/prometheus.sock", "127.0.0.1:8000", "unix@/run/stats.sock"]
    assert tight.count("mode 600") == 3
    assert "666" not in tight


def test_headers_that_steer_serve_are_dropped_at_the_front_only() -> None:
    tight = haproxy.tighten(CONFIG, "127.0.0.1:8000", "/run", {})
    front = tight.split("frontend http_frontend")[1].split("backend app")[0]
    assert all(f"http-request del-header {header}" in front for header in haproxy.SERVE_HEADERS)
    assert tight.count("http-request del-header") == len(haproxy.SERVE_HEADERS)


def test_errors_are_ours() -> None:
    tight = haproxy.tighten(CONFIG, "127.0.0.1:8000", "/run", {503: "/ours/503.http", 504: "/ours/504.http"})
    assert re.findall("errorfile .*", tight) == ["errorfile 503 /ours/503.http", "errorfile 504 /ours/504.http"]


def test_a_listener_that_is_not_known_is_closed_not_open() -> None:
    tight = haproxy.tighten(CONFIG + "frontend new_in_ray\n    bind *:9000 proto h2\n", "127.0.0.1:8000", "/run", {})
    assert "bind unix@/run/new_in_ray.sock mode 600 proto h2" in tight


def test_everything_else_is_kept() -> None:
    tight = haproxy.tighten(CONFIG, "127.0.0.1:8000", "/run", {})
    for line in ("hard-stop-after 660s", "use_backend app", "server one 127.0.0.1:30001 check", "stats enable"):
        assert line in tight


def rendered_by_serve(path: Path) -> str:
    """The configuration that the installed Ray Serve makes, with one application."""
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig

    backend = BackendConfig(name="http-app", path_prefix="/", app_name="app", servers=[ServerConfig("one", "127.0.0.1", 30001)])
    config = replace(HAProxyConfig(), socket_path=str(path / "admin.sock"), server_state_base=str(path), is_head=True)
    config = replace(config, server_state_file=str(path / "state"), metrics_socket_path=str(path / "metrics.sock"))
    config = replace(config, has_received_routes=True, has_received_servers=True, hard_stop_after_s=660)
    HAProxyApi(config, {"http-app": backend}, str(path / "haproxy.cfg"))._generate_config_file_internal()
    return (path / "haproxy.cfg").read_text()


def test_the_installed_serve_still_makes_what_we_tighten_and_haproxy_accepts_the_result(tmp_path: Path) -> None:
    binary = ingress.haproxy_binary()
    if binary is None:
        pytest.skip("no HAProxy for this system")
    loaded = settings.load(home=tmp_path / "home")
    ingress.install(loaded, tmp_path)
    original = rendered_by_serve(tmp_path)
    assert "mode 666" in original
    assert len(binds(original)) == 3
    result = subprocess.run(
        [tmp_path / "haproxy", "-c", "-f", tmp_path / "haproxy.cfg"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    tight = (tmp_path / "haproxy.cfg").read_text()
    assert [bind for bind in binds(tight) if not bind.startswith("unix@")] == ["127.0.0.1:8000"]
    assert f"errorfile 503 {tmp_path}/errors/503.http" in tight


def test_the_program_that_stands_for_haproxy_runs_alone(tmp_path: Path) -> None:
    """In isolated mode, from a directory whose files carry names of the standard library."""
    (tmp_path / "haproxy.cfg").write_text(CONFIG)
    command = [
        sys.executable,
        "-I",
        haproxy.__file__,
        "/bin/echo",
        "127.0.0.1:1",
        str(tmp_path),
        "-db",
        "-f",
        str(tmp_path / "haproxy.cfg"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["-db", "-f", str(tmp_path / "haproxy.cfg")]
    assert "127.0.0.1:1" in binds((tmp_path / "haproxy.cfg").read_text())
