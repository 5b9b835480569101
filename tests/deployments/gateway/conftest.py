"""A gateway on a real uvicorn on loopback, in a thread of its own, and the official client against it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import openai
import pytest
import uvicorn
from starlette.types import ASGIApp

from cluster.settings import GatewaySettings
from deployments.gateway.app import build_app
from deployments.gateway.keys import Verify
from deployments.gateway.tenancy import NONE, Tenancy
from deployments.gateway.wire import Wire
from tests.fakes import EchoModels, KeyRing


@dataclass
class Server:
    url: str
    models: EchoModels
    keys: KeyRing

    def client(self, key: str = KeyRing.USER, *, strict: bool = True) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, _strict_response_validation=strict)

    def http(self, key: str | None = KeyRing.USER) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=20)


@contextlib.contextmanager
def serving(
    models: EchoModels | None = None,
    keepalive_s: float = 15.0,
    tenancy: Tenancy = NONE,
    verify: Verify | None = None,
    wire: type[asyncio.Protocol] | str = Wire,
    app: ASGIApp | None = None,
    **options: object,
) -> Iterator[Server]:
    """With accounts, keys are theirs, else those of a `KeyRing`. `wire`: how HTTP is spoken; `app`: what is served in the
    gateway's place."""
    models, keys = models or EchoModels(), KeyRing()
    verify = verify or (tenancy.accounts.keys.verify if tenancy.accounts else keys.verify)
    app = app or build_app(models, verify, GatewaySettings(**options), tenancy=tenancy, keepalive_s=keepalive_s)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, http=wire, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        eventually(lambda: server.started)
        yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", models, keys)
        server.should_exit = True
        thread.join(10)


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def shared() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Server:
    """The shared server with a fresh state."""
    fresh = EchoModels()
    eventually(lambda: shared.models.open == 0)
    vars(shared.models).update(vars(fresh))
    return shared


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as http:
        yield http
