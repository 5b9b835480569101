"""Where models are reached: a name becomes a stream of chunks. The only module that knows Ray Serve's handles and Ray's errors.

The gateway and tests see `Models`; `ServeModels` is its implementation over the Serve applications `model-NAME`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from cluster.errors import ModelNotFound, Overloaded, PlatformError, ReplicaLost, Unavailable
from cluster.types import Adapter, Chunk, Deployment, Encode, Encoded, Generate, Predict, Predicted

log = logging.getLogger(__name__)

STALE_S = 1.0
"""Age at which the desired state and the readiness of models are asked again."""

PROBE_S = 2.0
"""A model that doesn't tell its facts within this time isn't ready."""


ASSIGN_S = 10.0
"""A call that no replica takes within this time is refused: all are gone, starting or full. Never an unbounded wait."""


Word = Literal["sleep", "wake"]


FACTS_S = 5.0
"""Facts of a model that are older are not used: a call waits for newer ones."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a model says of itself."""

    version: str  # another one: another answer to the same call is possible
    room: int | None  # tokens of its context window


class Answers(Protocol):
    """What models are asked for."""

    def generate(self, name: str, request: Generate) -> AsyncGenerator[Chunk, None]:
        """`name` is a model's, or BASE:ADAPTER. Raises PlatformError, ModelNotFound among them, at the first item or later.
        Closing it cancels the model's work."""
        ...

    async def encode(self, name: str, request: Encode) -> Encoded:
        """Raises PlatformError, ModelNotFound and ModelNotSupported among them. Cancelling it cancels the model's work."""
        ...

    async def predict(self, name: str, request: Predict) -> Predicted:
        """Raises PlatformError, ModelNotFound and ModelNotSupported among them. Cancelling it cancels the model's work."""
        ...


class Models(Answers, Protocol):
    """The served models, as the gateway sees them."""

    async def list(self) -> Sequence[Deployment]:
        """Every model that should be served, by name."""
        ...

    async def adapters(self) -> Sequence[Adapter]:
        """Every adapter of a model that should be served."""
        ...

    async def ready(self) -> dict[str, bool]:
        """For every model whether it answers now."""
        ...

    async def asleep(self) -> Sequence[str]:
        """Of the models that answer, those that would load first."""
        ...

    async def tell(self, name: str, word: Word) -> None:
        """Have every replica of a model sleep or wake. Raises ModelNotFound, Conflict and Unavailable."""
        ...

    async def stats(self) -> dict[str, dict[str, float]]:
        """The engine's counters of every model that answers, added up over its replicas."""
        ...

    async def facts(self, name: str) -> Facts | None:
        """About a model or BASE:ADAPTER, of a moment ago. None when it can't be asked now. Raises ModelNotFound."""
        ...

    async def info(self, name: str) -> Mapping[str, Any]:
        """What a model says of itself. Raises ModelNotFound, and Unavailable for one that doesn't answer."""
        ...


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
        self._handles: dict[str, Any] = {}
        self._listed: tuple[float, Sequence[Deployment], Sequence[Adapter]] | None = None
        self._probed: tuple[float, dict[str, bool]] | None = None
        self._asleep: set[str] = set()
        self._infos: dict[str, Mapping[str, Any]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._facts: dict[str, tuple[float, Facts | None]] = {}
        self._learning: dict[str, asyncio.Task[Facts | None]] = {}
        self._listing, self._probing, self._opening = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()

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
        try:
            await (await self._handle(name)).broadcast(word).results_async()
        except Exception as error:
            raise platform_error(error, name) from error

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
        async with aclosing(self._call(name, "generate", request)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def encode(self, name: str, request: Encode) -> Encoded:
        name, _ = await self._known(name)  # an adapter's base is no encoder, and says so
        async with aclosing(self._call(name, "encode", request)) as answers:
            async for answer in answers:
                encoded: Encoded = answer
                return encoded
        raise ReplicaLost(f"The model {name!r} gave no answer.", retry_after_s=1.0)

    async def predict(self, name: str, request: Predict) -> Predicted:
        name, _ = await self._known(name)  # likewise
        async with aclosing(self._call(name, "predict", request)) as answers:
            async for answer in answers:
                predicted: Predicted = answer
                return predicted
        raise ReplicaLost(f"The model {name!r} gave no answer.", retry_after_s=1.0)

    async def info(self, name: str) -> Mapping[str, Any]:
        name, _ = await self._known(name)
        if not (await self.ready()).get(name) or name not in self._infos:
            raise Unavailable(f"The model {name!r} can't answer now.", retry_after_s=1.0)
        return self._infos[name]

    async def _call(self, name: str, method: str, request: object) -> AsyncGenerator[Any, None]:
        """Items up to the one with `usage`, which is the last."""
        response, running = None, True
        try:
            response = getattr((await self._handle(name)).options(stream=True), method).remote(request)
            await _assigned(response, name)
            async for chunk in response:
                if chunk.usage is not None:  # nothing follows but the end of Serve's call, for which nobody need wait
                    running = False
                    self._end(response, name)
                yield chunk
                if not running:
                    return
            running = False
        except PlatformError:
            raise
        except Exception as error:
            running = False
            public = platform_error(error, name)
            if isinstance(public, Unavailable):
                await self._renew(name)
            raise public from error
        except asyncio.CancelledError:
            if _cancelled_by_us():
                raise
            raise Unavailable(f"The model {name!r} gave this request up.", retry_after_s=1.0) from None
        finally:
            if response is not None and running:  # the caller left, or time ran out
                response.cancel()

    def _end(self, response: Any, name: str) -> None:
        """Let a call whose last chunk has come reach its own end, beside the caller."""
        task = asyncio.ensure_future(_ended(response, name))
        self._ending.add(task)  # asyncio itself holds tasks weakly
        task.add_done_callback(self._ending.discard)

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

    async def _handle(self, name: str) -> Any:
        async with self._opening:  # each handle has a router of its own, so a model needs one
            if name not in self._handles:
                self._handles[name] = on_this_loop(await asyncio.to_thread(_serve_handle, name))
            return self._handles[name]

    async def _renew(self, name: str) -> None:
        """Forget a handle whose application became one of another kind of model: another deployment answers there now."""
        try:
            now = await asyncio.to_thread(_serve_handle, name)
        except Exception as error:
            log.info("no handle", extra={"model": name, "reason": platform_error(error, name).message})
            return
        if (known := self._handles.get(name)) is not None and known.deployment_name != now.deployment_name:
            del self._handles[name]

    async def _stats(self, name: str) -> dict[str, float]:
        """Empty for a model that doesn't answer."""
        try:
            async with asyncio.timeout(PROBE_S):
                replicas = await (await self._handle(name)).broadcast("stats").results_async()
        except Exception as error:
            log.info("no stats", extra={"model": name, "reason": platform_error(error, name).message})
            return {}
        return summed(replicas)

    async def _learn(self, name: str) -> Facts | None:
        asked, facts = self._clock(), None
        try:
            async with asyncio.timeout(PROBE_S):
                info = await (await self._handle(name)).info.remote()
            facts = Facts(str(info["digest"]), info.get("max_model_len")) if "digest" in info else None
        except Exception as error:
            log.info("no facts", extra={"model": name, "reason": platform_error(error, name).message})
        self._facts[name] = asked, facts
        del self._learning[name]
        return facts

    async def _answers(self, name: str) -> bool:
        try:
            async with asyncio.timeout(PROBE_S):
                info = await (await self._handle(name)).info.remote()
        except Exception as error:
            return isinstance(platform_error(error, name), Overloaded)  # too busy to say so is an answer, too
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


def _serve_handle(name: str) -> Any:
    """The application `model-NAME`, whatever its kind. Raises RayServeException when Serve has no such application."""
    from ray import serve

    return serve.get_app_handle(f"model-{name}")


def on_this_loop(handle: Any) -> Any:
    """The handle with Serve's router on the running event loop and plain gRPC to the replicas.

    By default every call and every item of a stream changes threads twice, and travels as an actor call of Ray: twice the work.
    Both switches are private in Ray 2.60, whose public one (RAY_SERVE_THROUGHPUT_OPTIMIZED) would break handles without a loop.
    """
    handle._init(_run_router_in_separate_loop=False)
    return handle._options(_by_reference=False)


async def _assigned(response: Any, name: str) -> None:
    """Wait until a replica has taken the call. Raises Unavailable when none does in time."""
    try:
        async with asyncio.timeout(ASSIGN_S):
            await response._fetch_future_result_async()  # private in Ray 2.60, which has no public way to wait for this
    except TimeoutError:
        raise Unavailable(f"The model {name!r} has no replica that can take this request now.", retry_after_s=2.0) from None


async def _ended(response: Any, name: str) -> None:
    try:
        async for _ in response:
            log.warning("a chunk after the last", extra={"model": name})
    except Exception as error:
        log.info("a call failed after its last chunk", extra={"model": name, "reason": platform_error(error, name).message})


def _cancelled_by_us() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def platform_error(error: BaseException, name: str) -> PlatformError:
    """What a failure of a handle call means to a caller."""
    from grpc.aio import AioRpcError  # type: ignore[import-untyped]
    from ray import exceptions
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

    if isinstance(error, exceptions.RayTaskError):
        error = error.cause
    if isinstance(error, PlatformError):
        return error
    if isinstance(error, BackPressureError):
        return Overloaded(f"The model {name!r} has no free place.", retry_after_s=error.retry_after_s or 1.0)
    if isinstance(error, (exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.NodeDiedError)):
        return ReplicaLost(f"The model {name!r} lost the replica that worked on this request.", retry_after_s=1.0)
    if isinstance(error, AioRpcError):  # the connection broke, or the replica closed it
        return ReplicaLost(f"The model {name!r} lost the connection to its replica.", retry_after_s=1.0)
    if isinstance(error, (DeploymentUnavailableError, RayServeException, exceptions.TaskCancelledError, TimeoutError)):
        return Unavailable(f"The model {name!r} can't answer now.", retry_after_s=1.0)
    return PlatformError(f"{type(error).__name__} in the model {name!r}")
