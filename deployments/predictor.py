"""A tabular model as a Serve deployment: one replica is one process with the model, which computes rows of many calls at once.

It checks tensors against the model's signature, lets rows be computed among those of others, and makes tensors of what comes out.
Reached through `router.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import serve

from cluster import ingress
from cluster import log as logs
from cluster.errors import ModelNotSupported, NotFound, PlatformError, Unavailable
from cluster.settings import Settings
from cluster.types import Chunk, Deployment, Encode, Encoded, Generate, Predict, Predicted, Usage
from deployments import replicas
from deployments.batching.batches import Batches
from deployments.predict.inspection import PLATFORM, inspect
from deployments.predict.loading import Results, Table, load
from deployments.predict.signature import Block

log = logging.getLogger(__name__)

CALLS = 256
"""Calls at once; what they bring is bounded by the gateway's longest body, and what waits in rows."""

INLINE_BYTES = 64 << 10
"""A call of more is read and answered beside the event loop."""


FIRST_GUESS = 100_000.0
"""Rows a second, before anything was measured."""


class Predictor:
    """Serves one model directory."""

    async def __init__(  # type: ignore[misc]
        self, deployment: Deployment, directory: str, digest: str, version: str, secret: bytes, settings: Settings
    ) -> None:
        ingress.bind_inside()
        logs.configure(settings.log_level)
        self._deployment, self._digest, self._version, self._secret = deployment, digest, version, secret
        self._directory, self._settings = Path(directory), settings
        await self.start()

    async def start(self) -> None:
        """Load the model and begin to take calls. Raises ModelNotServable."""
        own, self._num_rows, self._is_limited = self._settings.predictor, 0, False
        self._info = inspect(self._directory)
        self._table: Table | None = await asyncio.to_thread(self._load)
        self._signature = self._table.signature
        self._batches = Batches[Block, Results](
            self._run, target_s=own.step_target_ms / 1000, limit=own.max_queued_rows, name="predictor", speed=FIRST_GUESS
        )
        log.info("predictor ready", extra={"model": self._deployment.name, "version": self._version})

    async def predict(self, call: Predict) -> AsyncIterator[Predicted]:
        """One answer. Raises InvalidRequest for tensors that don't fit, NotFound for another version, and Overloaded. Closing it
        early takes its rows out of the queue."""
        if call.version not in (None, self._version):
            raise NotFound(f"The model {self._deployment.name!r} is served in version {self._version}.", param="version")
        wanted = self._signature.wanted(call.outputs)
        is_long = sum(len(tensor.data) for tensor in call.inputs) > INLINE_BYTES
        blocks = await _done(is_long, self._signature.blocks, call.inputs, wanted)
        results, compute_us = await self._batches.submit(self._opaque(call.tenant), blocks)
        outputs = await _done(is_long, self._signature.tensors, wanted, results)
        num_rows = sum(block.num_rows for block in blocks)
        self._num_rows += num_rows
        yield Predicted(outputs, num_rows, self._version, Usage(0, 0, compute_us=compute_us))

    async def generate(self, call: Generate) -> AsyncIterator[Chunk]:
        """Raises ModelNotSupported: this is no language model."""
        raise self._not_for("writes no text: ask a language model")
        yield  # type: ignore[unreachable]  # makes it a stream, as its caller expects

    async def encode(self, call: Encode) -> AsyncIterator[Encoded]:
        """Raises ModelNotSupported: this is no encoder."""
        raise self._not_for("makes no embeddings: ask an encoder")
        yield  # type: ignore[unreachable]  # likewise

    async def info(self) -> dict[str, Any]:
        """What a caller may want to know before it asks."""
        return {
            "name": self._deployment.name,
            "digest": self._digest,
            "asleep": self._table is None,
            "library_version": self._version,
            "platform": PLATFORM,
            "inputs": [asdict(spec) for spec in self._signature.inputs],
            "outputs": [asdict(spec) for spec in self._signature.outputs],
            "takes_nan": self._signature.takes_nan,
        }

    async def stats(self) -> dict[str, Any]:
        """The batches' counters, and the rows of answered calls."""
        counts = self._batches.stats
        told = {name: counts[name] for name in ("steps", "busy_s", "attributed_s", "held_s", "aborted", "streams", "waiting")}
        return {**told, "predicted_rows": self._num_rows, "asleep": int(self._table is None)}

    async def sleep(self) -> None:
        """Give the model's memory back until the next call."""
        self._table = None

    async def wake(self) -> None:
        """Raises ModelNotServable when the model can't be loaded again."""
        self._table = self._table or await asyncio.to_thread(self._load)

    async def check_health(self) -> None:
        """Serve asks every few seconds: a step that doesn't end, or batches that ended, need a new process."""
        if self._batches.is_dead:
            raise Unavailable("the predictor's batches have ended")
        if self._batches.step_s > self._settings.engine.step_deadline_s:
            raise Unavailable(f"a step has been running for {self._batches.step_s:.0f} s")

    async def close(self) -> None:
        await self._batches.close()

    def _run(self, blocks: Sequence[Block]) -> Sequence[Results | PlatformError]:
        if not self._is_limited:  # in this thread, once: it takes as long as a thousand rows
            from threadpoolctl import threadpool_limits

            threadpool_limits(self._settings.predictor.threads)
            self._is_limited = True
        table = self._table
        if table is None:  # it was put to sleep
            table = self._table = self._load()
        return table.run(blocks)

    def _load(self) -> Table:
        return load(self._directory, self._info)

    def _opaque(self, tenant: str) -> bytes:
        return hmac.digest(self._secret, b"predictor\0" + tenant.encode(), hashlib.sha256)

    def _not_for(self, what: str) -> ModelNotSupported:
        name = self._deployment.name
        return ModelNotSupported(
            f"{name} is a tabular model, which takes tensors (POST /v2/models/{name}/infer) and {what}.", param="model"
        )


async def _done(is_long: bool, work: Any, *arguments: Any) -> Any:
    return await asyncio.to_thread(work, *arguments) if is_long else work(*arguments)


def build(
    deployment: Deployment, directory: str, digest: str, version: str, secret: bytes, settings: Settings
) -> serve.Application:
    """The Serve application of one tabular model."""
    options = replicas.options("Predictor", deployment, cpus=settings.predictor.cpus, calls=CALLS, settings=settings)
    return serve.deployment(**options)(Predictor).bind(deployment, directory, digest, version, secret, settings)
