"""Where models are reached: a name of the desired state becomes a stream of chunks from the Serve application `model-NAME`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from cluster.errors import ModelNotFound, Overloaded, PlatformError, ReplicaLost, Unavailable
from cluster.types import Adapter, Chunk, Deployment, Encode, Encoded, Generate, Predict, Predicted
from deployments.handles import Handles
from deployments.models import Facts, Word

log = logging.getLogger(__name__)

STALE_S = 1.0
"""Age at which the desired state and the readiness of models are asked again."""

PROBE_S = 2.0
"""A model that doesn't tell its facts within this time isn't ready."""

FACTS_S = 5.0
"""Facts of a model that are older are not used: a call waits for newer ones."""


class ServeModels:
    """Models over Serve handles. `desired` reads the desired state, `adapters` what their adapters are; both may block, so they run
    beside the event loop."""

    def __init__(
        self,
        desired: Callable[[], Sequence[Deployment]],
        adapters: Callable[[], Sequence[Adapter]] = tuple,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._desired, self._adapters = desired, adapters
        self._clock = clock
        self._handles = Handles()
        self._listed: tuple[float, Sequence[Deployment], Sequence[Adapter]] | None = None
        self._probed: tuple[float, dict[str, bool]] | None = None
        self._asleep: set[str] = set()
        self._infos: dict[str, Mapping[str, Any]] = {}
        self._facts: dict[str, tuple[float, Facts | None]] = {}
        self._learning: dict[str, asyncio.Task[Facts | None]] = {}
        self._listing, self._probing = asyncio.Lock(), asyncio.Lock()

    async def list(self) -> Sequence[Deployment]:
        return (await self._state())[0]

    async def adapters(self) -> Sequence[Adapter]:
        deployments, adapters = await self._state()
        served = {deployment.name for deployment in deployments}
        return [adapter for adapter in adapters if adapter.base in served]

    async def _state(self) -> tuple[Sequence[Deployment], Sequence[Adapter]]:
        """At most `STALE_S` old."""
        async with self._listing:
            if self._listed is None or self._clock() - self._listed[0] >= STALE_S:
                asked = self._clock()
                self._listed = asked, *(await asyncio.to_thread(lambda: (self._desired(), self._adapters())))
            return self._listed[1:]

    async def ready(self) -> dict[str, bool]:
        async with self._probing:
            if self._probed is None or self._clock() - self._probed[0] >= STALE_S:
                names = [deployment.name for deployment in await self.list()]
                answers = await asyncio.gather(*(self._answers(name) for name in names))
                self._probed = self._clock(), dict(zip(names, answers, strict=True))
            return self._probed[1]

    async def asleep(self) -> Sequence[str]:
        states = await self.ready()
        return sorted(name for name in self._asleep if states.get(name))

    async def tell(self, name: str, word: Word) -> None:
        await self._known(name)
        self._probed = None
        await self._handles.everywhere(name, word)

    async def stats(self) -> dict[str, dict[str, float]]:
        names = [deployment.name for deployment in await self.list()]
        found = await asyncio.gather(*(self._stats(name) for name in names))
        return {name: stats for name, stats in zip(names, found, strict=True) if stats}

    async def facts(self, name: str) -> Facts | None:
        base, adapter = await self._known(name)
        asked, facts = self._facts.get(base, (-FACTS_S, None))
        age = self._clock() - asked
        if age >= STALE_S and base not in self._learning:
            self._learning[base] = asyncio.ensure_future(self._learn(base))
        if age >= FACTS_S or (facts is None and base in self._learning):
            facts = await asyncio.shield(self._learning[base])
        return replace(facts, version=f"{facts.version}:{adapter.address}") if facts and adapter else facts

    async def generate(self, name: str, request: Generate) -> AsyncGenerator[Chunk, None]:
        name, adapter = await self._known(name)
        if adapter:
            request = replace(request, adapter=adapter)
        async with aclosing(self._handles.call(name, "generate", request)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def encode(self, name: str, request: Encode) -> Encoded:
        name, _ = await self._known(name)  # an adapter's base is no encoder, and says so
        async with aclosing(self._handles.call(name, "encode", request)) as answers:
            async for answer in answers:
                encoded: Encoded = answer
                return encoded
        raise ReplicaLost(f"The model {name!r} gave no answer.", retry_after_s=1.0)

    async def predict(self, name: str, request: Predict) -> Predicted:
        name, _ = await self._known(name)  # likewise
        async with aclosing(self._handles.call(name, "predict", request)) as answers:
            async for answer in answers:
                predicted: Predicted = answer
                return predicted
        raise ReplicaLost(f"The model {name!r} gave no answer.", retry_after_s=1.0)

    async def info(self, name: str) -> Mapping[str, Any]:
        name, _ = await self._known(name)
        if not (await self.ready()).get(name) or name not in self._infos:
            raise Unavailable(f"The model {name!r} can't answer now.", retry_after_s=1.0)
        return self._infos[name]

    async def _known(self, name: str) -> tuple[str, Adapter | None]:
        """The model of that name; of BASE:ADAPTER the base, with the adapter. Raises ModelNotFound."""
        served = sorted(deployment.name for deployment in await self.list())
        if name in served:
            return name, None
        for adapter in await self.adapters():
            if adapter.model == name:
                return adapter.base, adapter
        known = ", ".join(served) or "none yet"
        raise ModelNotFound(f"The model {name[:256]!r} does not exist. Served models: {known}.", param="model")

    async def _stats(self, name: str) -> dict[str, float]:
        """Empty for a model that doesn't answer."""
        try:
            async with asyncio.timeout(PROBE_S):
                replicas = await self._handles.everywhere(name, "stats")
        except (PlatformError, TimeoutError) as error:
            log.info("no stats", extra={"model": name, "reason": str(error)})
            return {}
        return summed(replicas)

    async def _learn(self, name: str) -> Facts | None:
        asked, facts = self._clock(), None
        try:
            async with asyncio.timeout(PROBE_S):
                info = await self._handles.info(name)
            facts = Facts(str(info["digest"]), info.get("max_model_len")) if "digest" in info else None
        except (PlatformError, TimeoutError) as error:
            log.info("no facts", extra={"model": name, "reason": str(error)})
        self._facts[name] = asked, facts
        del self._learning[name]
        return facts

    async def _answers(self, name: str) -> bool:
        try:
            async with asyncio.timeout(PROBE_S):
                info = await self._handles.info(name)
        except (PlatformError, TimeoutError) as error:
            return isinstance(error, Overloaded)  # too busy to say so is an answer, too
        self._infos[name] = info
        (self._asleep.add if info.get("asleep") else self._asleep.discard)(name)
        return True


def summed(replicas: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a model's replicas count, added up; `oldest_s` is how long the first of them has counted."""
    total: Counter[str] = Counter()
    for counters in replicas:
        total.update({field: value for field, value in counters.items() if isinstance(value, (int, float))})
    ages = [counters["held_s"] for counters in replicas if "held_s" in counters]
    return dict(total) | ({"oldest_s": max(ages)} if ages else {})
