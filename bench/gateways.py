"""Gateways that can be killed: each a process of its own over one store, as the platform puts it together but for Ray and models.

A process is forked from one that has imported everything, so that a killed gateway is back at once. The model repeats and writes
down what it does, each fact before anybody else hears of it: what a caller can have had is in that journal, whoever was killed.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
import urllib.request
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from cluster.errors import ModelNotFound, ModelNotSupported
from cluster.settings import Settings
from cluster.types import Adapter, Chunk, Delta, Deployment, Encode, Encoded, Generate, Predict, Predicted, Usage
from deployments.models import Facts, Word
from tests.free_ports import free_port

MODEL = Deployment(name="echo", model="models:/echo@champion", created_at=1_700_000_000.0)
PROMPT_TOKENS = 7

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["bench.gateways", "deployments.gateway.app", "deployments.gateway.wire", "psycopg", "sqlite3"])


class Journal:
    """What the models of all gateways did, a line each: `began NONCE REQUEST MOMENT`, `said REQUEST` a token, `ended REQUEST`."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, *words: object) -> None:
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())


@dataclass(slots=True)
class Execution:
    """One call of the model, from the journal. `began` is of the machine's monotonic clock."""

    nonce: str
    request_id: str
    began: float
    said: int = 0
    ended: bool = False


def executions(path: Path) -> dict[str, Execution]:
    """By request."""
    found: dict[str, Execution] = {}
    for line in path.read_text().splitlines():
        match line.split():
            case ["began", nonce, request_id, moment]:
                assert request_id not in found, f"request {request_id} reached the model twice"
                found[request_id] = Execution(nonce, request_id, float(moment))
            case ["said", request_id]:
                found[request_id].said += 1
            case ["ended", request_id]:
                found[request_id].ended = True
    return found


class RepeatingModels:
    """`Models` with one that says `max_tokens` words. The last message is a nonce and the seconds between two words."""

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal

    def _note(self, *words: object) -> None:
        if self._journal is not None:
            self._journal.note(*words)

    async def generate(self, name: str, request: Generate) -> AsyncGenerator[Chunk, None]:
        await self.info(name)
        nonce, pause_s = request.messages[-1].content.split()
        tokens, id_ = request.sampling.max_tokens or 8, request.request_id
        self._note("began", nonce, id_, time.monotonic())
        begun: Usage | None = Usage(PROMPT_TOKENS, 0)
        for _ in range(tokens):
            await asyncio.sleep(float(pause_s))
            self._note("said", id_)
            yield Chunk((Delta(0, f" {nonce}", token_ids=(1,)),), begun=begun)
            begun = None
        self._note("ended", id_)
        yield Chunk((Delta(0, "", finish_reason="stop"),), Usage(PROMPT_TOKENS, tokens))

    async def facts(self, name: str) -> Facts | None:
        await self.info(name)
        return Facts("1", 4096)

    async def info(self, name: str) -> Mapping[str, Any]:
        if name != MODEL.name:
            raise ModelNotFound(f"The model {name!r} does not exist.", param="model")
        return {"name": name}

    async def list(self) -> Sequence[Deployment]:
        return [MODEL]

    async def adapters(self) -> Sequence[Adapter]:
        return []

    async def ready(self) -> dict[str, bool]:
        return {MODEL.name: True}

    async def asleep(self) -> Sequence[str]:
        return []

    async def stats(self) -> dict[str, dict[str, float]]:
        return {}

    async def tell(self, name: str, word: Word) -> None:
        await self.info(name)

    async def encode(self, name: str, request: Encode) -> Encoded:
        raise ModelNotSupported(f"{name} repeats, and does nothing else.", param="model")

    async def predict(self, name: str, request: Predict) -> Predicted:
        raise ModelNotSupported(f"{name} repeats, and does nothing else.", param="model")


def serve(settings: Settings, port: int, journal: Path | None) -> None:
    """The process: a gateway until it is ended. SIGTERM lets it finish what it works on, as Serve does."""
    import logging

    import uvicorn

    from cluster.store import Store
    from deployments.gateway.app import build_app
    from deployments.gateway.chores import Chores
    from deployments.gateway.tenancy import Tenancy
    from deployments.gateway.wire import Wire

    logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # is for whoever started us
    tenancy = Tenancy.of(Store(settings.store_url), settings)
    assert tenancy.accounts is not None
    models = RepeatingModels(Journal(journal) if journal else None)
    app = build_app(models, tenancy.accounts.keys.verify, settings.gateway, tenancy=tenancy)
    chores = Chores(tenancy.chores)
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, http=Wire, lifespan="off", backlog=2048)
    uvicorn.Server(config).run()
    chores.close()


@dataclass
class Gateway:
    """One of them, at a port that it keeps."""

    settings: Settings
    journal: Path | None
    port: int = field(default_factory=free_port)
    process: BaseProcess | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        assert self.process.pid is not None
        return self.process.pid

    def start(self) -> None:
        self.process = _PROCESSES.Process(target=serve, args=(self.settings, self.port, self.journal), daemon=True)
        self.process.start()

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self.process is not None:
            os.kill(self.pid, number)
            self.process.join(60)

    def wait(self, seconds: float = 60.0) -> None:
        """Until it answers. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                if time.monotonic() > end:
                    raise TimeoutError(f"no gateway answers at {self.url}") from None
                time.sleep(0.05)


class Gateways:
    """So many over one store; `with` ends them all."""

    def __init__(self, settings: Settings, count: int, journal: Path | None = None) -> None:
        self._each = [Gateway(settings, journal) for _ in range(count)]

    def __iter__(self) -> Iterator[Gateway]:
        return iter(self._each)

    def __getitem__(self, index: int) -> Gateway:
        return self._each[index]

    def __len__(self) -> int:
        return len(self._each)

    def __enter__(self) -> Gateways:
        with ExitStack() as started:
            for each in self._each:
                each.start()
                started.callback(each.end)
            for each in self._each:
                each.wait()
            started.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._each:
            each.end()
