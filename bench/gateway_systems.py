"""The three entrances to one echo model: bare FastAPI on Serve, our gateway on the same Serve, LiteLLM before the bare one.

Our gateway is the platform's, from its store of keys to HAProxy. LiteLLM has a key of its own and no database, so it neither limits
nor accounts for anything: that is its fastest form.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bench import echo
from bench.guarded import guarded, usual_engine
from bench.harness import HERE
from bench.systems import end, is_up
from cluster import ingress, launch, raynode
from cluster.desired import Desired
from cluster.private_files import Secrets
from cluster.settings import Settings
from cluster.store import Store
from cluster.tenancy.keys import Keys
from cluster.types import Deployment
from tests.free_ports import free_port

BARE, OURS, LITELLM = "bare Serve + FastAPI", "mmaas gateway", "LiteLLM proxy"
LITELLM_PROGRAM = HERE.parent / ".venv-litellm" / "bin" / "litellm"


@dataclass(frozen=True)
class Entrance:
    """Where one asks, and with which key."""

    base_url: str
    key: str = "none"

    @property
    def host(self) -> str:
        return urlsplit(self.base_url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.base_url).port or 80

    @property
    def path(self) -> str:
        return f"{urlsplit(self.base_url).path}/chat/completions"


@contextmanager
def entrances(stream_s: float, workers: int) -> Iterator[dict[str, Entrance]]:
    """All that can be started here; LiteLLM is left out where it is not installed."""
    with ExitStack() as stack:
        loaded = stack.enter_context(_platform(stream_s))
        found = {BARE: Entrance(f"{loaded.base_url}/bare/v1"), OURS: Entrance(f"{loaded.base_url}/v1", _key(loaded))}
        if LITELLM_PROGRAM.exists():
            found[LITELLM] = stack.enter_context(_litellm(found[BARE], workers))
        yield found


@contextmanager
def _platform(stream_s: float) -> Iterator[Settings]:
    """Ray, Serve, the echo model, our gateway and the bare application, in a home of its own."""
    gateway = {"MMAAS_GATEWAY__MAX_STREAM_S": str(stream_s + 120), "MMAAS_GATEWAY__MAX_ONGOING": "2048"}
    with guarded(lambda home: usual_engine(home) | gateway) as platform:
        loaded = platform.settings
        launch.start(loaded)
        try:
            _serve(loaded)
            yield loaded
        finally:
            import ray

            ray.shutdown()


def _serve(loaded: Settings) -> None:
    store = Store(loaded.store_url)
    store.migrate()
    Desired(store).put(Deployment(name=echo.NAME, model="models:/echo@champion"))
    store.close()
    raynode.join(loaded)
    from ray import serve

    from deployments.gateway import gateway

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options=ingress.http_options(loaded))
    model = serve.deployment(echo.LLM, name="LLM", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=4096).bind()
    handle = serve.run(model, name=f"model-{echo.NAME}", route_prefix=None)
    serve.run(gateway.build(loaded), name="gateway", route_prefix="/")
    serve.run(echo.bare(handle), name="bare", route_prefix="/bare")


def _key(loaded: Settings) -> str:
    store = Store(loaded.store_url)
    try:
        return Keys(store, Secrets(loaded.home).pepper).create("default", "gateway", ["inference"])[1]
    finally:
        store.close()


@contextmanager
def _litellm(upstream: Entrance, workers: int) -> Iterator[Entrance]:
    """Without our environment: nothing of it is LiteLLM's business. Raises RuntimeError with what it printed last."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="litellm-") as directory:
        path, log = Path(directory) / "config.json", Path(directory) / "log"
        path.write_text(json.dumps(litellm_config(upstream)))
        command = [str(LITELLM_PROGRAM), "--config", str(path), "--host", "127.0.0.1", "--port", str(port)]
        environment = {"PATH": os.defpath, "HOME": directory, "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, "--num_workers", str(workers), "--telemetry", "False"],
                env=environment,
                cwd=directory,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            if not is_up(process, f"http://127.0.0.1:{port}", "/health/liveliness"):
                raise RuntimeError(f"LiteLLM didn't come up: {log.read_text()[-3000:]}")
            yield Entrance(f"http://127.0.0.1:{port}/v1", "sk-bench")
        finally:
            end(process)


def litellm_config(upstream: Entrance) -> dict[str, object]:
    """YAML is a superset of JSON."""
    behind = {"model": f"openai/{echo.NAME}", "api_base": upstream.base_url, "api_key": upstream.key}
    return {
        "model_list": [{"model_name": echo.NAME, "litellm_params": behind}],
        "general_settings": {"master_key": "sk-bench"},
        "litellm_settings": {"request_timeout": 1200, "num_retries": 0},
    }
