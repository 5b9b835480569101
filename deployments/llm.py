"""A language model as a Serve deployment: one replica is one whole shard group.

This process holds no weights and no torch. It turns messages into ids, admits, streams ids back as text, and watches its group;
the ranks are its child actors (`shards.py`). Reached through `router.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray import serve

from cluster import ingress, raynode
from cluster import log as logs
from cluster.errors import ContextLengthExceeded, InvalidRequest, Overloaded, Unavailable
from cluster.settings import Settings
from cluster.types import Chunk, Delta, Deployment, Generate, Usage
from deployments.answer import Answer
from deployments.engine.checkpoint import inspect
from deployments.engine.defaults import sampling_defaults
from deployments.engine.device import bundle, reserved
from deployments.engine.engine import Request
from deployments.engine.rendezvous import Rendezvous
from deployments.engine.shard import ShardSpec, num_blocks
from deployments.engine.tokenizer import Tokenizer
from deployments.shards import ShardGroup

log = logging.getLogger(__name__)

SEED_BITS = 63

INLINE_CHARS = 2000
"""Characters of a prompt that are encoded within a millisecond."""


class LLM:
    """Serves one model directory."""

    async def __init__(self, deployment: Deployment, directory: str, digest: str, cache_secret: bytes, settings: Settings) -> None:  # type: ignore[misc]
        ingress.bind_inside()
        self._settings = settings
        self._digest = digest
        logs.configure(self._settings.log_level)
        self._deployment = deployment
        self._cache_secret = cache_secret
        engine, path = self._settings.engine, Path(directory)
        self._model = inspect(path, tp=deployment.tp, dtype=deployment.dtype, max_model_len=deployment.max_model_len)
        self._tokenizer = await asyncio.to_thread(Tokenizer.load, path)
        self._defaults = sampling_defaults(path)
        spec = ShardSpec(
            directory=path,
            model=self._model,
            num_blocks=num_blocks(self._model, engine),
            threads=engine.threads or max(1, (os.cpu_count() or 1) // deployment.tp),
            settings=engine,
            rendezvous=Rendezvous("", 0, deployment.tp, engine.start_deadline_s),
            gpu=0 if engine.device == "cuda" else None,  # Ray shows a shard no GPU but its own
        )
        self._group = ShardGroup(spec, raynode.ranks_directory(settings), log_level=self._settings.log_level)
        await self._group.start()
        blocks = self._group.engine.stats.blocks_total  # on a GPU, as many as fit
        self._room = min(self._model.max_model_len, blocks * engine.block_size)
        log.info("shard group ready", extra={"model": deployment.name, "ranks": deployment.tp, "pids": self._group.pids})

    async def generate(self, call: Generate) -> AsyncIterator[Chunk]:
        """Stream one answer. Raises, before the first chunk, InvalidRequest for a prompt that doesn't fit and Overloaded when the
        queue is full, or had to make place in it; at any time ReplicaLost. Closing the stream frees what it held."""
        engine, limits = self._group.engine, self._settings.engine
        is_full = engine.num_streams >= limits.max_sequences + limits.max_queued
        if is_full and not engine.make_place(self._opaque(call.tenant, b"flow"), call.priority):
            raise Overloaded(f"{self._deployment.name} has {engine.num_streams} requests at work and waiting", retry_after_s=1)
        request = await self._prepare(call)
        if call.sampling.max_tokens == 0:  # the legacy API counts or echoes a prompt so
            ends = tuple(Delta(index, "", finish_reason="length") for index in range(call.sampling.n))
            yield Chunk(ends, Usage(len(request.prompt), 0))
            return
        answer = Answer(
            self._tokenizer, request, is_chat=bool(call.messages), stop_choice=lambda index: engine.abort(request.id, index)
        )
        async for outputs in engine.generate(request):
            chunk = answer.take(outputs)
            if chunk.deltas:
                yield chunk

    async def info(self) -> dict[str, Any]:
        """What a caller may want to know before it asks."""
        return {
            "name": self._deployment.name,
            "digest": self._digest,
            "max_model_len": self._room,
            "can_chat": self._tokenizer.can_chat,
        } | {
            "model_type": self._model.model_type,
            "num_parameters": self._model.num_parameters,
            "tp": self._deployment.tp,
            "dtype": self._deployment.dtype,
        }

    async def stats(self) -> dict[str, Any]:
        """The engine's own counters, and the ranks' pids."""
        engine = self._group.engine
        counters: dict[str, Any] = msgspec.to_builtins(engine.stats)
        return counters | {"streams": engine.num_streams, "pids": self._group.pids}

    async def check_health(self) -> None:
        """Serve asks every few seconds. A group is well while every rank advances: rank 0 reports only after a step or a ping
        that all of them took part in."""
        engine = self._group.engine
        if engine.lost:
            self._leave_soon()
            raise Unavailable(engine.lost)
        if engine.silence_s > self._settings.engine.step_deadline_s:
            engine.fail(f"no rank has advanced for {engine.silence_s:.0f} s")
            self._group.kill()
            raise Unavailable(str(engine.lost))

    def _leave_soon(self) -> None:
        """End this process once its streams have had their error: Serve notices a dead replica at once, an ill one after three
        failed checks."""
        asyncio.get_running_loop().call_later(1.0, os._exit, 1)

    async def _prepare(self, call: Generate) -> Request:
        prompt = await asyncio.to_thread(self._encode, call) if is_long(call) else self._encode(call)
        if not prompt:
            raise InvalidRequest("The prompt is empty.", param="prompt")
        if max(prompt) >= self._model.vocab_size or min(prompt) < 0:
            raise InvalidRequest(f"A token id is outside 0..{self._model.vocab_size - 1}.", param="prompt")
        sampling = replace(call.sampling, **{name: value for name, value in self._defaults.items() if name in call.open})
        room = self._room - len(prompt)
        if room < (1 if sampling.max_tokens is None else sampling.max_tokens):
            wanted = f" and {sampling.max_tokens} for the answer" if sampling.max_tokens else ""
            raise ContextLengthExceeded(
                f"The model's context window is {self._room} tokens; the prompt has {len(prompt)}{wanted}.",
                param="messages" if call.messages else "prompt",
            )
        for token, _ in sampling.logit_bias:
            if not 0 <= token < self._model.vocab_size:
                raise InvalidRequest(f"logit_bias names token {token}; the model has {self._model.vocab_size}.", param="logit_bias")
        stop_ids = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(self._tokenizer.eos_ids))
        return Request(
            id=self._group.engine.next_id(),
            prompt=prompt,
            sampling=sampling,
            max_tokens=room if sampling.max_tokens is None else sampling.max_tokens,
            stop_ids=sorted(token for token in stop_ids if 0 <= token < self._model.vocab_size),
            seed=secrets.randbits(SEED_BITS) if sampling.seed is None else sampling.seed,
            salt=self._opaque(call.tenant, b"salt"),
            tenant=self._opaque(call.tenant, b"flow"),
            priority=call.priority,
        )

    def _opaque(self, tenant: str, use: bytes) -> bytes:
        """The tenant as the engine knows it: by a name for each use, which says nothing and which nobody can guess."""
        return hmac.digest(self._cache_secret, use + b"\0" + tenant.encode(), hashlib.sha256)

    def _encode(self, call: Generate) -> list[int]:
        if call.messages:
            return self._tokenizer.render(call.messages)
        return list(call.prompt_ids) if call.prompt_ids is not None else self._tokenizer.encode(call.prompt or "")


def is_long(call: Generate) -> bool:
    """Whether the prompt is better encoded beside the event loop. A short one costs less than the way to a thread and back."""
    return len(call.prompt or "") + sum(len(message.content) for message in call.messages) > INLINE_CHARS


def build(deployment: Deployment, directory: str, digest: str, cache_secret: bytes, settings: Settings) -> serve.Application:
    """The Serve application of one model. Replicas need `tp` bundles of what `engine.cpus_per_shard` and `gpus_per_shard` say."""
    engine = reserved(settings.engine, deployment.tp, ray.cluster_resources().get("GPU", 0.0))
    settings = settings.model_copy(update={"engine": engine})
    capacity = engine.max_sequences + engine.max_queued
    scaling: dict[str, Any] = {"num_replicas": deployment.min_replicas}
    if deployment.max_replicas > deployment.min_replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": deployment.min_replicas,
                "max_replicas": deployment.max_replicas,
                "target_ongoing_requests": engine.max_sequences,
            }
        }
    options = serve.deployment(
        name="LLM",
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=[bundle(engine)] * deployment.tp,
        placement_group_strategy="PACK",
        max_ongoing_requests=capacity + 16,  # the replica itself says no, in its own words, before Serve does
        max_queued_requests=capacity,
        graceful_shutdown_timeout_s=settings.gateway.max_stream_s + 10,
        max_surge_percent=100,  # a new version starts before the old one stops, and the old one finishes its streams
        health_check_period_s=2,
        health_check_timeout_s=5,
        max_constructor_retry_count=1,
        logging_config={"enable_access_log": False},  # the gateway writes one record of every call
        **scaling,
    )
    return options(LLM).bind(deployment, directory, digest, cache_secret, settings)
