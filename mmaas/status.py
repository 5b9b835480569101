"""`mmaas status`: what runs, what is served and what waits, collected from records, store and dashboard without joining Ray."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from cluster import launch
from cluster.dashboard import Dashboard
from cluster.desired import Desired
from cluster.errors import Unavailable
from cluster.occupancy import observe
from cluster.placement import explain
from cluster.settings import Settings
from cluster.store import Store
from cluster.types import Deployment

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Served:
    """A desired model beside what Serve says of it. `state` is Serve's word, `NOT_DEPLOYED` when it knows nothing, `ASLEEP` where
    it runs without its weights."""

    deployment: Deployment
    state: str
    replicas: int
    message: str


@dataclass(frozen=True)
class Status:
    home: str
    base_url: str
    parts: dict[str, bool]
    gateway: str
    models: list[Served] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def collect(settings: Settings) -> Status:
    parts = {part.name: part.is_running() for part in launch.parts(settings)}
    try:
        dashboard = Dashboard(settings)
        applications, waiting = dashboard.applications(), explain(observe(dashboard))
    except Unavailable:
        applications, waiting = {}, []
    asleep = _asleep(settings) if applications else set()
    served = [_served(deployment, applications.get(f"model-{deployment.name}"), asleep) for deployment in _desired(settings)]
    gateway = applications.get("gateway", {}).get("status", "NOT_DEPLOYED")
    return Status(str(settings.home), f"{settings.base_url}/v1", parts, gateway, served, waiting)


def render(status: Status, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    for name, up in {**status.parts, f"gateway {status.base_url}": status.gateway == "RUNNING"}.items():
        console.print(Text("up   " if up else "down ", "green" if up else "red") + Text(name))
    table = Table(box=None, pad_edge=False)
    for heading in ("model", "state", "replicas", "shards", "dtype", "source", "message"):
        table.add_column(heading, overflow="fold")
    for served in status.models:
        wanted = served.deployment
        replicas = f"{served.replicas} of {wanted.min_replicas}..{wanted.max_replicas}"
        kind = f"{wanted.dtype}, {wanted.quantization}" if wanted.quantization else wanted.dtype
        state = Text(served.state, "green" if served.state == "RUNNING" else "yellow")
        table.add_row(wanted.name, state, replicas, shards(wanted), kind, Text(wanted.model), Text(served.message))
    if status.models:
        console.print(table)
    for sentence in status.waiting:
        console.print(Text("waiting ", "yellow") + Text(sentence))


def shards(deployment: Deployment) -> str:
    """Shards of a copy: of each stage, where there are several."""
    return str(deployment.tp) if deployment.pp == 1 else f"{deployment.tp} in each of {deployment.pp} stages"


def _asleep(settings: Settings) -> set[str]:
    """As the gateway says; none where it says nothing."""
    import httpx

    try:
        answer = httpx.get(f"{settings.base_url}/ready", timeout=3, trust_env=False)
        return set(answer.json().get("asleep", ()))
    except (httpx.HTTPError, ValueError):
        return set()


def _served(deployment: Deployment, application: dict[str, Any] | None, asleep: Collection[str]) -> Served:
    if application is None:
        return Served(deployment, "NOT_DEPLOYED", 0, "run: mmaas up")
    replicas = [replica for part in application.get("deployments", {}).values() for replica in part.get("replicas", [])]
    running = sum(replica.get("state") == "RUNNING" for replica in replicas)
    state = application["status"]
    if state == "RUNNING" and deployment.name in asleep:
        state = "ASLEEP"
    return Served(deployment, state, running, application.get("message", ""))


def _desired(settings: Settings) -> list[Deployment]:
    """Nothing before the first `up`: looking must not make a database."""
    if settings.database_url is None and not (settings.home / "mmaas.db").exists():
        return []
    store = Store(settings.store_url)
    try:
        store.migrate()
        return Desired(store).list()
    finally:
        store.close()
