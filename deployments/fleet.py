"""The composition root of serving: makes Serve follow the desired state in the store. It can rebuild an empty cluster from it.

Read, plan, apply: `plan` is pure, and looks at what runs as it says of itself (`LLM.info`), so that a model is restarted only when
its own row, files or settings changed. Applications are addressed by name; nothing that isn't named here is touched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cluster import ingress, raynode
from cluster.desired import Desired
from cluster.errors import ModelNotServable, PlatformError, Unavailable
from cluster.library.registry import Registry
from cluster.placement import explain
from cluster.private_files import Secrets
from cluster.settings import Settings
from cluster.storage import Storage
from cluster.store import Store
from cluster.types import Deployment, ModelRef
from deployments.encode import inspection as encoders
from deployments.engine.checkpoint import inspect

PREFIX = "model-"
GATEWAY = "gateway"
POLL_S = 0.5

OnEvent = Callable[[str], None]
Kind = Literal["llm", "encoder"]


@dataclass(frozen=True)
class Target:
    """A deployment with its model found: the directory of the files, and a digest of all that makes a replica what it is."""

    deployment: Deployment
    directory: Path
    digest: str
    kind: Kind = "llm"


@dataclass(frozen=True)
class Plan:
    """What has to happen, in this order."""

    remove: tuple[str, ...]
    deploy: tuple[Target, ...]


def plan(targets: Sequence[Target], running: Mapping[str, str | None]) -> Plan:
    """`running`: the digest of each running model, None for one that can't tell (it is deployed anew)."""
    wanted = {target.deployment.name for target in targets}
    return Plan(
        remove=tuple(sorted(running.keys() - wanted)),
        deploy=tuple(target for target in targets if running.get(target.deployment.name) != target.digest),
    )


def apply(settings: Settings, on_event: OnEvent) -> None:
    """Make the cluster follow the desired state and wait until all of it answers. `on_event` gets a line for each step.

    Raises ModelNotServable for a model that can't be served as asked, before anything is started, and Unavailable for what does
    not come up within `engine.start_deadline_s`; what already runs goes on running.
    """
    raynode.join(settings)
    from ray import serve

    store = Store(settings.store_url)
    try:
        targets = [find(deployment, settings) for deployment in Desired(store).list()]
    finally:
        store.close()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its steps are ours to tell
    serve.start(http_options=ingress.http_options(settings))
    todo = plan(targets, _running())
    for name in todo.remove:
        on_event(f"removing {name}")
        serve.delete(PREFIX + name)
    _deploy_gateway(settings, on_event)
    for target in todo.deploy:
        _deploy_model(target, settings, on_event)


def find(deployment: Deployment, settings: Settings) -> Target:
    """Raises ModelNotServable or NotFound while nothing has been started yet."""
    directory = Path(deployment.model)
    if deployment.model.startswith("models:/"):
        registry = Registry(settings.mlflow_uri, Storage(settings.home / "library"))
        directory = Path(registry.resolve(ModelRef.parse(deployment.model)).path)
    try:
        kind: Kind = "encoder" if encoders.is_encoder(directory) else "llm"
        admit = encoders.inspect if kind == "encoder" else inspect
        admit(directory, tp=deployment.tp, dtype=deployment.dtype, max_model_len=deployment.max_model_len)
    except ModelNotServable as error:
        raise ModelNotServable(f"{deployment.name}: {error.message}") from error
    return Target(deployment, directory, _digest(deployment, directory, settings, kind), kind)


def _digest(deployment: Deployment, directory: Path, settings: Settings, kind: Kind) -> str:
    """Of the row, the files (by name, size and time: the library never changes one in place) and the engine's settings."""
    paths = [*directory.iterdir(), *(directory.glob("*/*") if kind == "encoder" else ())]
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    facts = [asdict(deployment), str(directory), files, settings.engine.model_dump(mode="json"), settings.gateway.max_stream_s]
    facts += [settings.encoder.model_dump(mode="json")] if kind == "encoder" else []
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _running() -> dict[str, str | None]:
    from ray import serve

    names = [name for name in serve.status().applications if name.startswith(PREFIX)]
    return {name.removeprefix(PREFIX): _digest_of(name) for name in names}


def _digest_of(application: str) -> str | None:
    """What the application says of itself; None while it doesn't answer. Any failure of it means that it is to be deployed anew."""
    from ray import exceptions, serve
    from ray.serve.exceptions import RayServeException

    try:
        info: dict[str, Any] = serve.get_app_handle(application).info.remote().result(timeout_s=5)
    except (exceptions.RayError, RayServeException, PlatformError, TimeoutError):
        return None
    return str(info["digest"])


def _deploy_gateway(settings: Settings, on_event: OnEvent) -> None:
    from ray import serve

    from deployments.gateway.gateway import build

    if (running := serve.status().applications.get(GATEWAY)) and running.status == "RUNNING":
        return
    on_event("starting the gateway")
    _run(build(settings), GATEWAY, "/")
    _wait(GATEWAY, settings, on_event)


def _deploy_model(target: Target, settings: Settings, on_event: OnEvent) -> None:
    from deployments import encoder, llm

    name, secret = PREFIX + target.deployment.name, Secrets(settings.home).prefix_cache
    ranks = f"{target.deployment.tp} shards" if target.deployment.tp > 1 else "one shard"
    on_event(f"loading {target.deployment.name} on {ranks}")
    build = encoder.build if target.kind == "encoder" else llm.build
    application = build(target.deployment, str(target.directory), target.digest, secret, settings)
    _run(application, name, None)
    _wait(name, settings, on_event)


def _run(application: Any, name: str, route_prefix: str | None) -> None:
    from ray import serve

    target = serve.RunTarget(target=application, name=name, route_prefix=route_prefix)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _wait(name: str, settings: Settings, on_event: OnEvent) -> None:
    """Until Serve says that the application runs, telling meanwhile what waits for what."""
    from ray import serve

    began = time.monotonic()
    while True:
        application = serve.status().applications[name]
        waited = time.monotonic() - began
        if application.status == "RUNNING":
            return
        if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise Unavailable(f"{name} did not start: {_reason(name, application.message)}")
        if waited > settings.engine.start_deadline_s:
            raise Unavailable(f"{name} did not start within engine.start_deadline_s={settings.engine.start_deadline_s:g} s")
        on_event(f"{name.removeprefix(PREFIX)}: {_waiting_for(settings) or 'starting'} ({waited:.0f} s)")
        time.sleep(POLL_S)


def _waiting_for(settings: Settings) -> str:
    from cluster.dashboard import Dashboard
    from cluster.occupancy import observe

    try:
        return "; ".join(explain(observe(Dashboard(settings))))
    except Unavailable:
        return ""


def _reason(name: str, message: str) -> str:
    """The last line that says something: Serve gives whole tracebacks."""
    from ray import serve

    texts = [deployment.message for deployment in serve.status().applications[name].deployments.values()]
    lines = [line.strip() for text in [message, *texts] for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("cluster.errors.")]
    reason: str = (ours or lines or ["no reason given"])[-1]
    return reason.removeprefix("cluster.errors.")
