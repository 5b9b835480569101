"""`mmaas doctor --security`: the running system as a stranger finds it. Nothing here asks a component how it is set up; it knocks.

Every check is a function of a door to knock at or a directory to look at, so that a test can put something wrong behind it. A check
changes nothing that belongs to callers and never raises; what did not answer is told as that, never as secure.
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

from cluster import launch, ports, raynode
from cluster.doctor import Check
from cluster.outside import Answer, Door
from cluster.settings import Settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
RAY_PATHS = ("/api/jobs/", "/api/version", "/api/v0/actors", "/api/serve/applications/", "/nodes?view=summary", "/logs")
PUBLIC = frozenset({"/health", "/ready", "/v2/health/live", "/v2/health/ready"})
"""What the gateway may tell everybody, beside its description of itself."""
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
}
WEAK_KEYS = ("", "EMPTY", "none", "test", "admin", "changeme", "sk-1234", "sk-test", "password", "mk_", "mk_" + "0" * 84, "mmaas")
"""What people write where a key must stand, and what other platforms come with."""
STRANGER = "Bearer mk_0123456789ab" + "0" * 64 + "00000000"
INSIDES = re.compile(r"Traceback|File \"|site-packages|\.py\b|/usr/|/home/|/root/|/tmp/|ray::|sqlalchemy|psycopg|\b0x[0-9a-f]{6,}")


def examine(settings: Settings) -> list[Check]:
    """All checks, the widest door first. What is not running is not checked, and that is told."""
    gateway = Door(settings.gateway.host if settings.gateway.host != "0.0.0.0" else "127.0.0.1", settings.gateway.port)  # noqa: S104
    family = {process.pid for process in launch.family(settings)}
    found = [
        check_reach(_outer_addresses(), _ports(settings, family), {settings.gateway.port} if _is_public(settings) else set()),
        check_tls(gateway, public=_is_public(settings)),
        *check_gateway(gateway),
    ]
    if settings.ray.address is None:
        found.append(check_ray(Door("127.0.0.1", settings.ray.dashboard_port)))
    if settings.mlflow.tracking_uri is None:
        found.append(check_mlflow(Door("127.0.0.1", settings.mlflow.port)))
    return [*found, check_files(settings.home, raynode.temporary_directory(settings)), check_secrets(settings.home)]


def check_gateway(door: Door) -> list[Check]:
    """All that the one public door must refuse."""
    if not door.ask("GET", "/health").status:
        return [_unseen("gateway", door)]
    return [
        check_anonymous(door),
        check_weak_keys(door),
        check_headers(door.ask("GET", "/health", {"x-request-id": "mine"})),
        check_hosts(door),
        check_lengths(door),
        check_steering(door),
        check_serve_pages(door),
        check_errors(door),
    ]


def check_reach(addresses: Iterable[str], inside: Iterable[int], public: set[int]) -> Check:
    """Every port of ours, knocked at from each address by which other machines could come."""
    doors = [Door(address, port) for address in addresses for port in sorted(set(inside) - public)]
    if open_doors := [f"{door.host}:{door.port}" for door in doors if door.is_open()]:
        seen = f"{', '.join(open_doors[:8])} can be reached from outside"
        return Check("reach", "fail", seen, "only the gateway may be; end them, or close them with a firewall")
    return Check("reach", "ok", f"{len(doors)} doors tried, all closed to other machines")


def check_tls(door: Door, *, public: bool) -> Check:
    if not public:
        return Check("TLS", "ok", "the gateway is on loopback: nothing leaves this machine")
    if door.speaks_tls():
        return Check("TLS", "ok", "the gateway speaks TLS")
    return Check(
        "TLS", "fail", f"keys and prompts pass {door.host}:{door.port} in clear", "put a proxy with TLS in front of loopback"
    )


def check_anonymous(door: Door) -> Check:
    """Every operation of the gateway's own description, without a key and with one that nobody was given."""
    try:
        document = json.loads(door.ask("GET", "/openapi.json").body)
    except ValueError:
        return Check("anonymous calls", "warn", "the gateway does not describe itself", "is something else on its port?")
    calls = [(method.upper(), path) for path, item in document["paths"].items() for method in item]
    asked = [(method, path, re.sub(r"\{\w+\}", "x", path)) for method, path in calls if path not in PUBLIC]
    let_in = []
    for method, path, target in [*asked, *((method, "/nowhere", "/nowhere") for method in METHODS)]:
        for headers in ({}, {"Authorization": STRANGER}):
            if door.ask(method, target, headers, "{}" if method != "GET" else "").status != 401:
                let_in.append(f"{method} {path}")
    if let_in:
        seen = f"{', '.join(dict.fromkeys(let_in))} answered without a valid key"
        return Check("anonymous calls", "fail", seen, "take the gateway off the network and report this")
    return Check("anonymous calls", "ok", f"{len(asked)} operations get 401 without a key and with an invented one")


def check_weak_keys(door: Door) -> Check:
    """`/v1/models` costs nothing and tells a key that counts from one that doesn't."""
    weak = [key for key in WEAK_KEYS if door.ask("GET", "/v1/models", {"Authorization": f"Bearer {key}"}).status != 401]
    if weak:
        return Check("default keys", "fail", f"{weak[0]!r} is let in", "revoke it: mmaas keys list; mmaas keys revoke ID")
    return Check("default keys", "ok", f"none of {len(WEAK_KEYS)} usual ones is let in")


def check_headers(answer: Answer) -> Check:
    """`answer` is one to a request that named an identifier, `mine`."""
    wrong = [name for name, value in HEADERS.items() if answer.headers.get(name) != value]
    if "server" in answer.headers:
        wrong.append(f"server: {answer.headers['server']}")
    if not re.fullmatch(r"req_[0-9a-f]{32}", answer.headers.get("x-request-id", "")):
        wrong.append("x-request-id is not ours")
    if wrong:
        return Check("headers", "fail", ", ".join(wrong), "is a proxy in front that changes headers?")
    return Check("headers", "ok", "nosniff, no-store, no frames, our own request id, no server's name")


def check_hosts(door: Door) -> Check:
    heads = {"no Host": "", "two Hosts": "Host: a\r\nHost: b\r\n"}
    return _refused(
        "Host", door, {name: f"GET /health HTTP/1.1\r\n{head}Connection: close\r\n\r\n" for name, head in heads.items()}
    )


def check_lengths(door: Door) -> Check:
    """Requests that two readers of a chain could read differently."""
    post = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    both = {
        "two lengths": f"{post}Content-Length: 5\r\nContent-Length: 6\r\n\r\n012345",
        "a folded coding": f"{post}Content-Length: 5\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
        "an unknown coding": f"{post}Content-Length: 5\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "a zero byte": f"{post}X: \x00\r\n\r\n",
    }
    return _refused("ambiguous requests", door, both)


def check_steering(door: Door) -> Check:
    """With one of these headers a caller of Ray Serve ends calls early, or keeps them from ending."""
    steered = {"x-request-timeout-seconds": "0.000001", "x-request-disconnect-disabled": "?1", "serve_multiplexed_model_id": "x"}
    if door.ask("GET", "/health", steered).status != 200:
        return Check("control headers", "fail", "Serve obeys a caller's headers", "is the platform behind its own HAProxy?")
    return Check("control headers", "ok", "a caller's Serve headers change nothing")


def check_serve_pages(door: Door) -> Check:
    told = [path for path in ("/-/routes", "/-/healthz", "/%2d/routes") if door.ask("GET", path).status not in (401, 404)]
    if told:
        return Check("Serve's pages", "fail", f"{', '.join(told)} answer everybody", "restart the platform: mmaas down; mmaas up")
    return Check("Serve's pages", "ok", "/-/routes and /-/healthz are closed")


def check_errors(door: Door) -> Check:
    """What refusals say of our insides."""
    key = {"Authorization": STRANGER}
    answers = [door.ask(method, path, key, body) for method, path, body in _REFUSED] + [door.say(b"\x16\x03\x01\r\n\r\n")]
    if leaks := [leak[0] for answer in answers if (leak := INSIDES.search(answer.body))]:
        return Check("errors", "fail", f"an error says {leaks[0]!r}", "report this")
    return Check("errors", "ok", f"{len(answers)} refusals say nothing of our insides")


_REFUSED = [
    ("GET", "/nowhere/%00/../../etc/passwd", ""),
    ("POST", "/v1/completions", "{"),
    ("TRACE", "/health", ""),
    ("PUT", "/health", "x"),
]


def check_ray(door: Door) -> Check:
    """Ray's dashboard is the cluster's administrator: without the token, or with a wrong one, nothing may answer."""
    if not door.ask("GET", "/api/healthz").status:
        return _unseen("Ray token", door)
    browser = {"User-Agent": "Mozilla/5.0", "Origin": "http://evil.example"}
    callers: list[Mapping[str, str]] = [{}, {"Authorization": "Bearer " + "0" * 64}, browser]
    tries = [(method, path, headers) for method in METHODS for path in RAY_PATHS for headers in callers]
    let_in = [f"{method} {path}" for method, path, headers in tries if door.ask(method, path, headers).status < 400]
    if let_in:
        seen = f"{', '.join(dict.fromkeys(let_in[:6]))} answered without the token"
        return Check("Ray token", "fail", seen, "run: mmaas down; mmaas up (it sets RAY_AUTH_MODE=token)")
    return Check("Ray token", "ok", f"{len(tries)} calls without the token are refused")


def check_mlflow(door: Door) -> Check:
    """MLflow has no password here, so it may answer to this machine's own names only (DNS rebinding), and must not run jobs."""
    if not door.ask("GET", "/health").status:
        return _unseen("MLflow", door)
    search = "/api/2.0/mlflow/experiments/search"
    rebound = door.ask("POST", search, {"Host": "evil.example", "Content-Type": "application/json"}, '{"max_results": 1}')
    if rebound.status < 400:
        seen = "answers to a name that is not this machine's"
        return Check("MLflow", "fail", seen, "set MLFLOW_SERVER_ALLOWED_HOSTS to localhost,127.0.0.1")
    if door.ask("GET", "/ajax-api/3.0/jobs/x").status == 200:
        return Check("MLflow", "fail", "runs jobs for everybody", "set MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false")
    seen = "has no password: whoever may log in to this machine may use it"
    return Check("MLflow", "warn", seen, "let nobody else log in here, or use a server of your own (mlflow.tracking_uri)")


def check_files(home: Path, temporary: Path) -> Check:
    """What other users of this machine could read or write."""
    private = [home, temporary, *(home / name for name in ("secrets", "library", "runs", "mlflow", "logs", "run", "audit"))]
    files = [*(home / "secrets").glob("*"), home / "quickstart.json", home / "settings.yaml", home / "mmaas.db"]
    wrong = [f"{path} has mode {_mode(path):04o}" for path in private if path.exists() and _mode(path) & 0o077]
    wrong += [f"{path} has mode {_mode(path):04o}" for path in files if path.exists() and _mode(path) & 0o077 and _strict(path)]
    wrong += [f"{path} belongs to user {path.lstat().st_uid}" for path in [*private, *files] if _is_foreign(path)]
    if wrong:
        return Check(
            "files", "fail", "; ".join(wrong[:4]), "chmod 700 directories and 600 files; replace secrets that others may have read"
        )
    return Check("files", "ok", f"{home} and {temporary} are yours alone")


def check_secrets(home: Path) -> Check:
    """Secrets must be random; a file that somebody filled by hand, or copied, mostly isn't."""
    weak = []
    for path in sorted((home / "secrets").glob("*")):
        text = path.read_text(errors="replace").strip()
        if len(text) < 32 or len(set(text)) < 10:
            weak.append(path.name)
    if weak:
        return Check(
            "secrets", "fail", f"{', '.join(weak)} can be guessed", "delete it while the platform is down; a new one is made"
        )
    return Check("secrets", "ok", "long and random" if home.exists() else "none yet")


def _refused(name: str, door: Door, requests: Mapping[str, str]) -> Check:
    answers = {what: door.say(raw.encode("latin-1")).status for what, raw in requests.items()}
    if taken := [what for what, status in answers.items() if status and not 400 <= status < 500]:
        return Check(name, "fail", f"{', '.join(taken)} accepted", "is httptools the gateway's parser? report this")
    return Check(name, "ok", f"{', '.join(requests)}: refused")


def _unseen(name: str, door: Door) -> Check:
    return Check(name, "warn", f"nothing answers at {door.host}:{door.port}, so nothing was checked", "run: mmaas up")


def _is_public(settings: Settings) -> bool:
    return settings.gateway.host not in LOOPBACK


def _ports(settings: Settings, family: set[int]) -> set[int]:
    """Those that our processes listen on, and those that the settings name."""
    named = {port for part in launch.parts(settings) for port in part.ports.values()}
    return named | {listener.port for listener in ports.listeners(family)} if family else named


def _outer_addresses() -> list[str]:
    kinds = (socket.AF_INET, socket.AF_INET6)
    found = [entry.address for entries in psutil.net_if_addrs().values() for entry in entries if entry.family in kinds]
    return sorted({address for address in found if not address.startswith(("127.", "::1", "fe80"))})


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _strict(path: Path) -> bool:
    """In a home that nobody else enters, SQLite's own mode of a database does no harm."""
    return path.suffix != ".db" or bool(_mode(path.parent) & 0o077)


def _is_foreign(path: Path) -> bool:
    return path.exists() and path.lstat().st_uid not in (os.getuid(), 0)
