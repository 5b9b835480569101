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
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray import serve
from ray.util import get_current_placement_group

from cluster import ingress, priority, raynode
from cluster import log as logs
from cluster.errors import Conflict, ContextLengthExceeded, InvalidRequest, ModelNotSupported, Overloaded, Unavailable
from cluster.settings import EngineSettings, Settings
from cluster.types import Chunk, Constraint, Delta, Deployment, Encode, Encoded, Generate, Predict, Predicted, Usage
from deployments.adapters import Adapters, finder
from deployments.admission import Admission
from deployments.answer import Answer
from deployments.engine.checkpoint import ModelInfo, admit
from deployments.engine.defaults import sampling_defaults
from deployments.engine.device import bundle, reserved
from deployments.engine.messages import Request
from deployments.engine.rendezvous import Rendezvous
from deployments.engine.shard_spec import ShardSpec, num_blocks
from deployments.engine.tokenizer import Tokenizer
from deployments.life import Life
from deployments.shards import ShardGroup
from deployments.slots import Slots
from deployments.tools.formats import find_format

log = logging.getLogger(__name__)

SEED_BITS = 63

INLINE_CHARS = 2000
"""Characters of a prompt that are encoded within a millisecond."""


@dataclass(frozen=True, slots=True)
class Edition:
    """What a replica is made of: the files, a digest of everything, one of everything but the files, and Serve's name for the code
    that runs. Replicas with the same `frame` can take each other's files without a restart."""

    directory: str
    digest: str
    frame: str
    version: str


class LLM:
    """Serves one model directory."""

    async def __init__(  # type: ignore[misc]
        self, deployment: Deployment, edition: Edition, cache_secret: bytes, settings: Settings
    ) -> None:
        ingress.bind_inside()
        priority.step_back()  # behind its ranks
        self._settings = settings
        self._edition = edition
        logs.configure(self._settings.log_level)
        self._deployment = deployment
        self._cache_secret = cache_secret
        engine, path = self._settings.engine, Path(edition.directory)
        self._model = admit(deployment, path, engine.device)
        self._tokenizer = await asyncio.to_thread(Tokenizer.load, path)
        self._tools = find_format(self._tokenizer, engine.tool_formats.get(deployment.name))
        self._defaults = sampling_defaults(path)
        self._admission = Admission(path)
        ranks = deployment.tp * deployment.pp
        spec = ShardSpec(
            directory=path,
            model=self._model,
            num_blocks=num_blocks(self._model, engine),
            threads=engine.threads or max(1, (os.cpu_count() or 1) // ranks),
            settings=engine,
            rendezvous=Rendezvous("", 0, ranks, engine.start_deadline_s, deployment.pp),
            gpu=0 if engine.device == "cuda" else None,  # Ray shows a shard no GPU but its own
        )
        placement, folder = get_current_placement_group(), raynode.ranks_directory(settings)
        find = finder(settings.home / "library", path, deployment.dtype)

        def make(directory: Path) -> ShardGroup:
            group = ShardGroup(replace(spec, directory=directory), folder, placement, log_level=settings.log_level)
            self._adapters = Adapters(find, group.engine.order, Slots(engine.max_adapters, engine.adapter_bytes))  # it has none yet
            return group

        self._life = Life(make, path, engine, self._leave_soon)
        await self._life.start()
        blocks = self._life.engine.stats.blocks_total  # on a GPU, as many as fit
        self._room = min(self._model.max_model_len, blocks * engine.block_size)
        log.info("shard group ready", extra={"model": deployment.name, "ranks": ranks, "pids": self._life.group.pids})

    async def generate(self, call: Generate) -> AsyncIterator[Chunk]:
        """Stream one answer. Raises, before the first chunk, InvalidRequest for a prompt that doesn't fit and Overloaded when the
        queue is full, or had to make place in it; at any time ReplicaLost. Closing the stream frees what it held."""
        engine, limits = self._life.engine, self._settings.engine
        is_full = engine.num_streams + self._adapters.num_waiting >= limits.max_sequences + limits.max_queued
        if is_full and not engine.make_place(self._opaque(call.tenant, b"flow"), call.priority):
            raise Overloaded(f"{self._deployment.name} has {engine.num_streams} requests at work and waiting", retry_after_s=1)
        request = await self._prepare(call)
        if call.sampling.max_tokens == 0:  # the legacy API counts or echoes a prompt so
            ends = tuple(Delta(index, "", finish_reason="length") for index in range(call.sampling.n))
            whole = Usage(len(request.prompt), 0)
            yield Chunk(ends, whole, begun=whole)
            return
        tools = self._tools if offers(call) else None
        answer = Answer(
            self._tokenizer,
            request,
            is_chat=bool(call.messages),
            stop_choice=lambda index: engine.abort(request.id, index),
            calls=[tools.stream(call.tools, call.tool_choice) for _ in range(call.sampling.n)] if tools else (),
            shown=tools.shown if tools else None,
        )
        self._life.wanted()
        if call.adapter:
            await self._life.wake()  # nothing is loaded into a model that sleeps
        async with (
            self._adapters.held(call.adapter) as adapter,  # let go last: by then its sequences must have left the engine
            aclosing(engine.generate(msgspec.structs.replace(request, adapter=adapter))) as stream,
        ):
            async for outputs in stream:
                chunk = answer.take(outputs)
                if chunk.deltas:
                    yield chunk

    async def encode(self, call: Encode) -> AsyncIterator[Encoded]:
        """Raises ModelNotSupported: this is no encoder."""
        message = f"{self._deployment.name} is a language model: ask it for chat or completions, and an encoder for this."
        raise ModelNotSupported(message, param="model")
        yield  # type: ignore[unreachable]  # makes it a stream, as its caller expects

    async def predict(self, call: Predict) -> AsyncIterator[Predicted]:
        """Raises ModelNotSupported: it takes text."""
        message = f"{self._deployment.name} is a language model, which takes text and no tensors: use /v1/chat/completions."
        raise ModelNotSupported(message, param="model")
        yield  # type: ignore[unreachable]  # likewise

    async def info(self) -> dict[str, Any]:
        """What a caller may want to know before it asks."""
        return {
            "name": self._deployment.name,
            **asdict(self._edition),
            "asleep": self._life.state == "asleep",
            "max_model_len": self._room,
            "can_chat": self._tokenizer.can_chat,
            "can_call_tools": self._tools is not None,
        } | {
            "model_type": self._model.model_type,
            "num_parameters": self._model.num_parameters,
            "tp": self._deployment.tp,
            "pp": self._deployment.pp,
            "dtype": self._deployment.dtype,
            "quantization": self._deployment.quantization,
        }

    async def stats(self) -> dict[str, Any]:
        """The engine's own counters, those of its groups' life, and the ranks' pids and nodes."""
        life, engine = self._life, self._life.engine
        counters: dict[str, Any] = msgspec.to_builtins(engine.stats)
        lives = {"asleep": int(life.state == "asleep"), "lost": life.num_lost, "stuck": life.num_stuck}
        adapters = {"adapters": self._adapters.num_loaded, "adapter_loads": self._adapters.num_loads}
        group = {"streams": engine.num_streams, "pids": life.group.pids, "nodes": life.group.nodes}
        return counters | lives | adapters | group

    async def sleep(self) -> None:
        """Give the memory of weights and KV cache back until the next request. Raises what `Life.sleep` does."""
        await self._life.sleep()

    async def wake(self) -> None:
        """Raises Unavailable when the model can't be loaded again."""
        await self._life.wake()

    async def swap(self, edition: Edition) -> None:
        """Take another directory's weights, without a restart. Raises what `Life.swap` does; the old ones serve on then."""
        if edition.digest == self._edition.digest:
            return
        if edition.frame != self._edition.frame:
            raise Conflict("more than the weights has changed")
        await self._life.swap(Path(edition.directory))
        self._edition = edition

    async def reconfigure(self, config: dict[str, str]) -> None:
        """Serve's way to tell a replica that its edition has changed; it was told before in most cases, by `swap`."""
        await self.swap(Edition(**config))

    async def check_health(self) -> None:
        """Serve asks every few seconds. Losing a group is `Life`'s business, until it gives up."""
        if self._life.state == "lost":
            raise Unavailable(self._life.engine.lost or "the shard group is lost")

    def _leave_soon(self) -> None:
        """End this process once its streams have had their error: Serve notices a dead replica at once, an ill one after three
        failed checks."""
        asyncio.get_running_loop().call_later(1.0, os._exit, 1)

    async def _prepare(self, call: Generate) -> Request:
        constraint = self._constraint(call)
        prompt = await asyncio.to_thread(self._encode, call) if is_long(call) else self._encode(call)
        if not prompt:
            raise InvalidRequest("The prompt is empty.", param="prompt")
        if max(prompt) >= self._model.vocab_size or min(prompt) < 0:
            raise InvalidRequest(f"A token id is outside 0..{self._model.vocab_size - 1}.", param="prompt")
        defaults = {name: value for name, value in self._defaults.items() if name in call.open}
        sampling = replace(call.sampling, constraint=constraint, **defaults)
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
        if sampling.constraint:
            await self._admission.admit(sampling.constraint, self._opaque(call.tenant, b"flow"))
        stop_ids = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(self._tokenizer.eos_ids))
        stop_ids |= self._tools.stop_ids if offers(call) and self._tools else frozenset()
        return Request(
            id=self._life.engine.next_id(),
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

    def _constraint(self, call: Generate) -> Constraint | None:
        """The form that the answer must have. Raises InvalidRequest for tools that this model can't call."""
        asked = call.sampling.constraint
        if not offers(call):
            return asked
        if self._tools is None:
            raise InvalidRequest(
                f"The model {self._deployment.name!r} can't call tools: its chat template doesn't know them, or writes calls in a "
                "form that this server doesn't read. Leave tools out or set tool_choice to 'none'.",
                param="tools",
                code="unsupported_parameter",
            )
        return self._tools.constraint(call.tools, call.tool_choice, asked)

    def _encode(self, call: Generate) -> list[int]:
        if call.messages:
            return self._tokenizer.render(call.messages, call.tools if offers(call) else ())
        return list(call.prompt_ids) if call.prompt_ids is not None else self._tokenizer.encode(call.prompt or "")


def is_long(call: Generate) -> bool:
    """Whether the prompt is better encoded beside the event loop. A short one costs less than the way to a thread and back."""
    tools = sum(len(tool.parameters) + len(tool.description or "") for tool in call.tools)
    calls = sum(len(made.arguments) for message in call.messages for made in message.tool_calls)
    return len(call.prompt or "") + tools + calls + sum(len(message.content) for message in call.messages) > INLINE_CHARS


def offers(call: Generate) -> bool:
    """Whether the model is shown tools: those that it must not call it isn't told about."""
    return bool(call.tools) and call.tool_choice.mode != "none"


def bundles(deployment: Deployment, model: ModelInfo, engine: EngineSettings) -> list[dict[str, float]]:
    """What a replica reserves. A bundle is always on one node: one for each stage keeps its shards together, and stages go to other
    nodes when one has not the cores, or not the memory for weights, keys and values. Without stages there is a bundle for each
    shard, so a layer may be torn over nodes, if it must."""
    if deployment.pp == 1:
        return [bundle(engine)] * deployment.tp
    cached = num_blocks(model, engine) * engine.block_size * model.kv_bytes_per_token
    memory = float((model.weight_bytes + cached) // deployment.pp)
    return [{"CPU": engine.cpus_per_shard * deployment.tp, "memory": memory}] * deployment.pp


def build(deployment: Deployment, edition: Edition, cache_secret: bytes, settings: Settings) -> serve.Application:
    """The Serve application of one model. Replicas need the bundles that `bundles` says. Deploying another edition of the same
    `version` restarts none of them: Serve calls `reconfigure`."""
    engine = reserved(settings.engine, deployment.tp * deployment.pp, ray.cluster_resources().get("GPU", 0.0))
    settings = settings.model_copy(update={"engine": engine})
    model = admit(deployment, edition.directory, engine.device)
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
        placement_group_bundles=bundles(deployment, model, engine),
        placement_group_strategy="PACK",
        max_ongoing_requests=capacity + 16,  # the replica itself says no, in its own words, before Serve does
        max_queued_requests=capacity,
        graceful_shutdown_timeout_s=settings.gateway.max_stream_s + 10,
        max_surge_percent=100,  # a new version starts before the old one stops, and the old one finishes its streams
        health_check_period_s=2,
        health_check_timeout_s=5,
        max_constructor_retry_count=1,
        user_config=asdict(edition),
        logging_config={"enable_access_log": False},  # the gateway writes one record of every call
        **scaling,
    )
    versioned = ingress.versioned(options(LLM), edition.version)
    application: serve.Application = versioned.bind(deployment, edition, cache_secret, settings)
    return application
