"""The gateway as a Serve deployment: one application for HTTP, one method for handles, the same parts behind both.

The only module here that touches Serve. Parts are made inside the replica: a database connection can't travel.
"""

from __future__ import annotations

import gc
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI

from cluster.settings import Settings
from deployments.gateway import calls
from deployments.gateway.answering import Part
from deployments.gateway.app import build_app
from deployments.gateway.chores import Chores
from deployments.gateway.keys import Verify
from deployments.gateway.tenancy import Tenancy
from deployments.models import Models
from deployments.router import ServeModels

APPLICATION = "gateway"
DEPLOYMENT = "Gateway"

HEADROOM = 64
"""Requests that Serve lets in beyond our own limit, so that a full gateway still answers probes and refusals itself."""

Parts = Callable[[Settings], tuple[Models, Verify, Tenancy]]


def from_store(settings: Settings) -> tuple[Models, Verify, Tenancy]:
    """Served models, keys and what stands around every call, as the platform's store has them."""
    from cluster.adapters import Catalog
    from cluster.desired import Desired
    from cluster.store import Store

    store = Store(settings.store_url)
    tenancy = Tenancy.of(store, settings)
    assert tenancy.accounts is not None, "the store has them"
    return ServeModels(Desired(store).list, Catalog(store).list), tenancy.accounts.keys.verify, tenancy


class Gateway:
    """One replica of the entrance."""

    def __init__(self, settings: Settings, parts: Parts = from_store) -> None:
        from cluster import ingress, log, priority

        ingress.bind_inside()
        priority.step_back()
        log.configure(settings.log_level)
        self._settings = settings
        models, verify, tenancy = parts(settings)
        self._app = build_app(models, verify, settings.gateway, tenancy=tenancy)
        self._chores = Chores(tenancy.chores)
        gc.collect()
        gc.freeze()  # the hundreds of thousands of objects of Ray and the routes live as long as we do: look at what is new alone

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor: what it serves over HTTP."""
        return self._app

    async def call(self, key: str, operation: str, body: Mapping[str, Any]) -> AsyncGenerator[Part, None]:
        """The operations of the HTTP API for handles; see `calls.py`. Call with `.options(stream=True)`."""
        async with aclosing(calls.call(self._app.state.entrance, key, operation, body)) as answers:
            async for answer in answers:
                yield answer

    def __del__(self) -> None:
        """Called by Serve when the replica has drained: what waits is written."""
        if chores := getattr(self, "_chores", None):
            chores.close()

    async def check_health(self) -> None:
        """That this runs is the proof: the event loop turns. A store in trouble is no reason to cut streams."""


def build(settings: Settings, parts: Parts = from_store) -> Any:
    """The Serve application (`ray.serve.Application`), to be run as `gateway` at the route prefix `/`."""
    from ray import serve

    options = settings.gateway
    deployment = serve.deployment(
        serve.ingress()(Gateway),
        name=DEPLOYMENT,
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=options.max_ongoing + HEADROOM,
        graceful_shutdown_timeout_s=options.max_stream_s + 30,
        health_check_period_s=10,
        health_check_timeout_s=30,
        logging_config={"enable_access_log": False},  # ours has the key, the model and the tokens, too
    )
    return deployment.bind(settings, parts)
