"""The composition root of serving: makes Serve follow the desired state in the store. It can rebuild an empty cluster from it.

Read, plan, apply: `plan` is pure, and looks at what runs as it says of itself (`LLM.info`), so that a model is restarted only when
its own row, files or settings changed. Applications are addressed by name; nothing that isn't named here is touched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cluster import ingress, raynode
from cluster.desired import Desired
from cluster.errors import ModelNotFound, ModelNotServable, PlatformError, Unavailable
from cluster.library.registry import Registry
from cluster.placement import explain
from cluster.private_files import Secrets
from cluster.settings import Settings
from cluster.storage import Storage
from cluster.store import Store
from cluster.types import Deployment, ModelRef
from deployments.encode import inspection as encoders
from deployments.engine.checkpoint import admit
from deployments.predict import inspection as predictors

PREFIX = "model-"
GATEWAY = "gateway"
POLL_S = 0.5

OnEvent = Callable[[str], None]
Kind = Literal["llm", "encoder", "predictor"]


@dataclass(frozen=True)
class Target:
    """A deployment with its model found: the directory of the files, a digest of all that makes a replica what it is, and one of
    all but the files."""

    deployment: Deployment
    directory: Path
    digest: str
    frame: str = ""  # empty: the files of one that runs can't be changed
    kind: Kind = "llm"
    version: str = "1"  # the library's; a directory is its own first


@dataclass(frozen=True)
class Plan:
    """What has to happen, in this order."""

    remove: tuple[str, ...]
    swap: tuple[tuple[Target, str], ...]  # with the version that runs
    deploy: tuple[Target, ...]


def plan(targets: Sequence[Target], running: Mapping[str, Mapping[str, Any] | None]) -> Plan:
    """`running`: what each running model says of itself, None for one that can't tell (it is deployed anew). Where only the files
    have changed, the replicas can take them as they run."""
    wanted = {target.deployment.name for target in targets}
    told = [(target, running.get(target.deployment.name) or {}) for target in targets]
    changed = [(target, info) for target, info in told if info.get("digest") != target.digest]
    swap = tuple((target, str(info["version"])) for target, info in changed if target.frame and info.get("frame") == target.frame)
    return Plan(
        remove=tuple(sorted(running.keys() - wanted)),
        swap=swap,
        deploy=tuple(target for target, _ in changed if target not in [swapped for swapped, _ in swap]),
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
    for target, version in todo.swap:
        if not _swapped(target, version, settings, on_event):
            _deploy_model(target, settings, on_event)
    for target in todo.deploy:
        _deploy_model(target, settings, on_event)


def find(deployment: Deployment, settings: Settings) -> Target:
    """Raises ModelNotServable or NotFound while nothing has been started yet."""
    directory, version = Path(deployment.model), "1"
    if deployment.model.startswith("models:/"):
        registry = Registry(settings.mlflow_uri, Storage(settings.home / "library"))
        found = registry.resolve(ModelRef.parse(deployment.model))
        directory, version = Path(found.path), str(found.version)
    try:
        if predictors.is_predictor(directory):
            return _predictor(deployment, directory, version, settings)
        if encoders.is_encoder(directory):
            return _encoder(deployment, directory, settings)
        return _llm(deployment, directory, settings)
    except ModelNotServable as error:
        raise ModelNotServable(f"{deployment.name}: {error.message}") from error


def _llm(deployment: Deployment, directory: Path, settings: Settings) -> Target:
    admit(deployment, directory, settings.engine.device)
    frame = _frame(deployment, settings)
    return Target(deployment, directory, _digest(deployment, directory, directory.iterdir(), frame), frame)


def _encoder(deployment: Deployment, directory: Path, settings: Settings) -> Target:
    if deployment.pp != 1 or deployment.quantization:
        raise ModelNotServable("an encoder is served whole, in float32 or bfloat16: without --pp and --quantization")
    encoders.inspect(directory, tp=deployment.tp, dtype=deployment.dtype, max_model_len=deployment.max_model_len)
    files, facts = [*directory.iterdir(), *directory.glob("*/*")], settings.encoder.model_dump_json()
    return Target(deployment, directory, _digest(deployment, directory, files, facts), kind="encoder")


def _predictor(deployment: Deployment, directory: Path, version: str, settings: Settings) -> Target:
    plain = Deployment(deployment.name, deployment.model)
    if any(getattr(deployment, name) != getattr(plain, name) for name in ("tp", "pp", "dtype", "quantization", "max_model_len")):
        raise ModelNotServable(
            "a tabular model is served as it was saved: without --tp, --pp, --dtype, --quantization, --max-model-len"
        )
    predictors.inspect(directory)
    facts = json.dumps([version, settings.predictor.model_dump(mode="json")])
    digest = _digest(deployment, directory, directory.iterdir(), facts)
    return Target(deployment, directory, digest, kind="predictor", version=version)


def _digest(deployment: Deployment, directory: Path, paths: Iterable[Path], frame: str) -> str:
    """Of the row, the files (by name, size and time: the library never changes one in place) and all else that makes a replica."""
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    facts = [asdict(deployment), str(directory), files, frame]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _frame(deployment: Deployment, settings: Settings) -> str:
    """Of the row without the model, and the engine's settings."""
    facts = [asdict(replace(deployment, model="")), settings.engine.model_dump(mode="json"), settings.gateway.max_stream_s]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _running() -> dict[str, Mapping[str, Any] | None]:
    from ray import serve

    names = [name for name in serve.status().applications if name.startswith(PREFIX)]
    return {name.removeprefix(PREFIX): _info_of(name) for name in names}


def _info_of(application: str) -> Mapping[str, Any] | None:
    """What the application says of itself; None while it doesn't answer. Any failure of it means that it is to be deployed anew."""
    from ray import exceptions, serve
    from ray.serve.exceptions import RayServeException

    try:
        info: dict[str, Any] = serve.get_app_handle(application).info.remote().result(timeout_s=5)
    except (exceptions.RayError, RayServeException, PlatformError, TimeoutError):
        return None
    return info


def tell(name: str, word: str, *arguments: Any, settings: Settings) -> None:
    """Have every replica of a served model do something, and wait for it: `sleep`, `wake`, `swap`.

    Raises ModelNotFound for a model that isn't served, and what a replica raises.
    """
    raynode.join(settings)
    from ray import exceptions, serve
    from ray.serve.exceptions import RayServeException

    try:
        told = serve.get_app_handle(PREFIX + name).broadcast(word, *arguments)
        told.results(timeout_s=settings.engine.start_deadline_s)
    except exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, PlatformError) else Unavailable(f"{name}: {error.cause}") from None
    except RayServeException as error:
        raise ModelNotFound(f"no model is served as {name!r}", param="model") from error
    except (exceptions.RayError, TimeoutError) as error:
        raise Unavailable(f"{name} did not {word}: {type(error).__name__}") from error


def _swapped(target: Target, version: str, settings: Settings, on_event: OnEvent) -> bool:
    """Have the replicas take the new files as they run, then tell Serve, for those that it will start. False when they can't.

    Raises ModelNotServable for weights that nobody could serve; the old ones go on, and Serve hears of nothing.
    """
    name = target.deployment.name
    edition = _edition(target, version)
    on_event(f"{name}: swapping weights")
    try:
        tell(name, "swap", edition, settings=settings)
    except ModelNotServable as error:
        raise ModelNotServable(f"{name}: {error.message}") from error
    except PlatformError as error:
        on_event(f"{name}: {error.message}; it is restarted instead")
        return False
    _run_model(target, version, settings, on_event)
    return True


def _edition(target: Target, version: str) -> Any:
    from deployments.llm import Edition

    return Edition(str(target.directory), target.digest, target.frame, version)


def _deploy_gateway(settings: Settings, on_event: OnEvent) -> None:
    from ray import serve

    from deployments.gateway.gateway import build

    if (running := serve.status().applications.get(GATEWAY)) and running.status == "RUNNING":
        return
    on_event("starting the gateway")
    _run(build(settings), GATEWAY, "/")
    _wait(GATEWAY, settings, on_event)


def _deploy_model(target: Target, settings: Settings, on_event: OnEvent) -> None:
    count = target.deployment.tp * target.deployment.pp
    ranks = f"{count} shards" if count > 1 else "one shard"
    on_event(f"loading {target.deployment.name}" + (f" on {ranks}" if target.kind == "llm" else ""))
    _run_model(target, f"{target.digest}-{secrets.token_hex(4)}", settings, on_event)


def _run_model(target: Target, version: str, settings: Settings, on_event: OnEvent) -> None:
    """Serve replaces replicas of another version, and tells the others of their edition."""
    from deployments import encoder, llm, predictor

    name, secret = PREFIX + target.deployment.name, Secrets(settings.home).prefix_cache
    wanted, directory = target.deployment, str(target.directory)
    if target.kind == "predictor":
        application = predictor.build(wanted, directory, target.digest, target.version, secret, settings)
    elif target.kind == "encoder":
        application = encoder.build(wanted, directory, target.digest, secret, settings)
    else:
        application = llm.build(target.deployment, _edition(target, version), secret, settings)
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
