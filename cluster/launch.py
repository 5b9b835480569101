"""The platform's own processes on this machine: a Ray head and an MLflow server, started, repaired and ended.

`start` brings up what is missing and touches nothing that works. `stop` ends exactly what `start` began, with all descendants, and
makes sure that nothing is left. What runs is recorded in HOME/run. What is served on top is none of its business.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster import ports, processes, raynode, tracking
from cluster.errors import Conflict, Unavailable
from cluster.private_files import private_directory
from cluster.settings import Settings

logger = logging.getLogger(__name__)
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy of the environment can't reach our loopback


@dataclass(frozen=True)
class Part:
    """One process tree of the platform. `ports` maps the setting to the port; `health` answers 200 when the part works."""

    name: str
    title: str
    ports: Mapping[str, int]
    health: str
    prepare: Callable[[], None]
    command: list[str]
    environment: Mapping[str, str]
    mark: str
    record: Path
    log: Path
    grace_s: float
    deadline_s: float = 120.0

    def is_running(self) -> bool:
        recorded = processes.load(self.record)
        return recorded is not None and recorded.find() is not None and _status(self.health) == 200


def parts(settings: Settings) -> list[Part]:
    """What this machine has to run: nothing for a service whose address the settings name."""
    found = []
    if settings.ray.address is None:
        found.append(_ray(settings))
    if settings.mlflow.tracking_uri is None:
        found.append(_mlflow(settings))
    return found


def is_running(settings: Settings) -> bool:
    return all(part.is_running() for part in parts(settings))


def start(settings: Settings, on_event: Callable[[str], None] = lambda text: None) -> list[str]:
    """Start or repair the parts; returns the names of those that had to be started (none: all of it was running).

    Raises Conflict when a port is taken, Unavailable when a part does not come up in time; the log's last lines say why.
    """
    private_directory(settings.home)
    with _alone(settings):
        missing = [part for part in parts(settings) if not part.is_running()]
        for part in missing:
            on_event(f"starting {part.title}")
            _end(part)
            for setting, port in part.ports.items():
                ports.require_free(port, setting)
            part.prepare()
            processes.save(part.record, processes.spawn(part.command, part.environment, part.log))
        for part in missing:
            on_event(f"waiting for {part.title}")
            _wait_until_running(part)
    return [part.name for part in missing]


def stop(settings: Settings) -> int:
    """End everything that `start` began; returns the number of processes ended. Raises Conflict if any survives."""
    with _alone(settings):
        return sum(_end(part) for part in parts(settings))


def family(settings: Settings) -> list[psutil.Process]:
    """All running processes of this platform, Ray's workers and Serve's replicas included."""
    return [process for part in parts(settings) for process in _family(part)]


def _family(part: Part) -> list[psutil.Process]:
    recorded = processes.load(part.record)
    return processes.family([recorded] if recorded else [], part.mark)


def _end(part: Part) -> int:
    """End the part's processes; more than one round, because one that is ending may still start another."""
    ended: set[int] = set()
    for _ in range(5):
        if not (running := _family(part)):
            break
        ended |= {process.pid for process in running}
        processes.end(running, part.grace_s)
    else:
        left = ", ".join(f"{process.pid} ({process.name()})" for process in _family(part))
        raise Conflict(f"these processes of {part.title} can't be ended: {left}")
    part.record.unlink(missing_ok=True)
    return len(ended)


def _wait_until_running(part: Part) -> None:
    deadline = time.monotonic() + part.deadline_s
    while not part.is_running():
        recorded = processes.load(part.record)
        ended = recorded is None or recorded.find() is None
        if ended or time.monotonic() > deadline:
            what = "ended" if ended else f"did not answer within {part.deadline_s:.0f} s"
            raise Unavailable(f"{part.title} {what} while starting; the end of {part.log}:\n{_tail(part.log)}")
        time.sleep(0.2)


def status_without_token(settings: Settings) -> int:
    """The HTTP status that Ray's job interface gives to a caller without a token; 0 when nothing answers."""
    return _status(f"http://127.0.0.1:{settings.ray.dashboard_port}/api/jobs/")


def _status(url: str) -> int:
    try:
        with _DIRECT.open(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(no log)"


@contextlib.contextmanager
def _alone(settings: Settings) -> Iterator[None]:
    """Only one process at a time starts or stops this platform. Raises Conflict when another is at it."""
    with (private_directory(settings.home / "run") / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"another mmaas is starting or stopping the platform in {settings.home}; wait for it") from None
        yield


def _ray(settings: Settings) -> Part:
    used = {f"ray.{name}": getattr(settings.ray, name) for name in ("gcs_port", "dashboard_port", "client_port")}
    mark = f"{raynode.identity(settings)}-ray"
    return Part(
        name="ray",
        title="Ray",
        ports=used | {"gateway.port": settings.gateway.port, "gateway.internal_port": settings.gateway.internal_port},
        health=f"http://127.0.0.1:{settings.ray.dashboard_port}/api/gcs_healthz",
        prepare=lambda: raynode.prepare(settings),
        command=raynode.command(settings),
        environment=raynode.head_environment(settings) | {processes.MARK: mark},
        mark=mark,
        record=settings.home / "run" / "ray.json",
        log=settings.home / "logs" / "ray.log",
        grace_s=3.0,  # nothing in Ray is worth more: checkpoints and published files are atomic, and the raylet would take 10 s
    )


def _mlflow(settings: Settings) -> Part:
    mark = f"{raynode.identity(settings)}-mlflow"
    return Part(
        name="mlflow",
        title="MLflow",
        ports={"mlflow.port": settings.mlflow.port},
        health=f"http://127.0.0.1:{settings.mlflow.port}/health",
        prepare=lambda: tracking.prepare(settings),
        command=tracking.command(settings),
        environment=tracking.environment(settings) | {processes.MARK: mark},
        mark=mark,
        record=settings.home / "run" / "mlflow.json",
        log=settings.home / "logs" / "mlflow.log",
        grace_s=10.0,
    )
