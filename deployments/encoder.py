"""An encoder as a Serve deployment: one replica is one process with its own weights and its own batches.

It makes rows of what was asked, lets them be encoded among those of others, and says what comes out as embeddings, scores or
probabilities. Reached through `router.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ray import serve

from cluster import ingress
from cluster import log as logs
from cluster.errors import ModelNotSupported, Unavailable
from cluster.settings import Settings
from cluster.types import Chunk, Deployment, Encode, Encoded, Generate, Predict, Predicted, Usage
from deployments import replicas
from deployments.encode.batcher import Batcher
from deployments.encode.inspection import inspect
from deployments.encode.tasks import Tasks

log = logging.getLogger(__name__)

CALLS = 512
"""Calls at once; how much they may bring is bounded in tokens."""


class Encoder:
    """Serves one model directory."""

    async def __init__(self, deployment: Deployment, directory: str, digest: str, secret: bytes, settings: Settings) -> None:  # type: ignore[misc]
        from deployments.encode.loading import load

        ingress.bind_inside()
        logs.configure(settings.log_level)
        self._deployment, self._digest, self._secret, self._settings = deployment, digest, secret, settings
        path = Path(directory)
        self._info = inspect(path, tp=deployment.tp, dtype=deployment.dtype, max_model_len=deployment.max_model_len)
        engine, own = settings.engine, settings.encoder
        threads = own.threads or os.cpu_count() or 1
        model = await asyncio.to_thread(load, path, self._info, threads=threads, native=engine.native, cache=engine.cache)
        self._tasks = await asyncio.to_thread(Tasks, path, self._info)
        self._width = model.width
        target_s = own.step_target_ms / 1000
        self._batcher = Batcher(model.run, model.width, target_s=target_s, limit=own.max_queued_tokens)
        log.info("encoder ready", extra={"model": deployment.name, "task": self._info.task})

    async def encode(self, call: Encode) -> AsyncIterator[Encoded]:
        """One answer. Raises InvalidRequest for inputs that don't fit, ModelNotSupported for a task that this model doesn't do, and
        Overloaded. Closing it early takes its rows out of the queue."""
        self._tasks.check(call, self._width)
        rows = await asyncio.to_thread(self._tasks.rows, call)
        vectors, compute_us = await self._batcher.metered(self._opaque(call.tenant), rows)
        numbers = await asyncio.to_thread(self._tasks.finish, call, vectors)
        usage = Usage(sum(len(row) for row in rows), 0, compute_us=compute_us)
        labels = self._info.labels if call.task == "classify" else ()
        yield Encoded(numbers.astype("<f4").tobytes(), numbers.shape[1], usage, labels)

    async def generate(self, call: Generate) -> AsyncIterator[Chunk]:
        """Raises ModelNotSupported: this is no language model."""
        kind = "classifies and reranks" if self._info.task == "classify" else "makes embeddings and reranks"
        raise ModelNotSupported(
            f"{self._deployment.name} is an encoder, which {kind} and writes no text: ask a language model.", param="model"
        )
        yield  # type: ignore[unreachable]  # makes it a stream, as its caller expects

    async def predict(self, call: Predict) -> AsyncIterator[Predicted]:
        """Raises ModelNotSupported: it takes texts."""
        calls = "/v1/classify or /v1/rerank" if self._info.task == "classify" else "/v1/embeddings or /v1/rerank"
        message = f"{self._deployment.name} is an encoder, which takes texts and no tensors: use {calls}."
        raise ModelNotSupported(message, param="model")
        yield  # type: ignore[unreachable]  # likewise

    async def sleep(self) -> None:
        """Raises ModelNotSupported: an encoder is small, and stays."""
        raise ModelNotSupported(f"{self._deployment.name} is an encoder, which can't be put to sleep.", param="model")

    async def wake(self) -> None:
        """It is awake."""

    async def info(self) -> dict[str, Any]:
        """What a caller may want to know before it asks."""
        info = self._info
        return {
            "name": self._deployment.name,
            "digest": self._digest,
            "task": info.task,
            "max_model_len": info.max_tokens,
            "width": self._width,
            "labels": list(info.labels),
            "prompts": [name for name, _ in info.prompts],
        } | {"model_type": info.model_type, "num_parameters": info.num_parameters, "tp": 1, "dtype": info.dtype}

    async def stats(self) -> dict[str, Any]:
        """The batcher's counters."""
        return self._batcher.stats

    async def check_health(self) -> None:
        """Serve asks every few seconds: a step that doesn't end, or a batcher that ended, needs a new process."""
        if self._batcher.is_dead:
            raise Unavailable("the encoder's batcher has ended")
        if self._batcher.step_s > self._settings.engine.step_deadline_s:
            raise Unavailable(f"a step has been running for {self._batcher.step_s:.0f} s")

    def _opaque(self, tenant: str) -> bytes:
        return hmac.digest(self._secret, b"encoder\0" + tenant.encode(), hashlib.sha256)


def build(deployment: Deployment, directory: str, digest: str, secret: bytes, settings: Settings) -> serve.Application:
    """The Serve application of one encoder."""
    options = replicas.options("Encoder", deployment, cpus=settings.encoder.cpus, calls=CALLS, settings=settings)
    return serve.deployment(**options)(Encoder).bind(deployment, directory, digest, secret, settings)
