"""Calls of served models over Ray Serve. The only module that knows Serve's handles and Ray's errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from cluster.errors import Overloaded, PlatformError, ReplicaLost, Unavailable

log = logging.getLogger(__name__)

ASSIGN_S = 10.0
"""A call that no replica takes within this time is refused: all are gone, starting or full. Never an unbounded wait."""


class Handles:
    """One handle for each model, as each has a router of its own; made when it is needed, on the running event loop."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._opening = asyncio.Lock()

    async def call(self, name: str, method: str, request: object) -> AsyncGenerator[Any, None]:
        """Items up to the one with `usage`, which is the last. Raises PlatformError. Closing it cancels the replica's work."""
        response, running = None, True
        try:
            response = getattr((await self._of(name)).options(stream=True), method).remote(request)
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

    async def info(self, name: str) -> Mapping[str, Any]:
        """What any replica says of its model. Raises PlatformError."""
        try:
            told: Mapping[str, Any] = await (await self._of(name)).info.remote()
        except Exception as error:
            raise platform_error(error, name) from error
        return told

    async def everywhere(self, name: str, method: str) -> Sequence[Any]:
        """What every replica answers. Raises PlatformError."""
        try:
            answers: Sequence[Any] = await (await self._of(name)).broadcast(method).results_async()
        except Exception as error:
            raise platform_error(error, name) from error
        return answers

    def _end(self, response: Any, name: str) -> None:
        """Let a call whose last chunk has come reach its own end, beside the caller."""
        task = asyncio.ensure_future(_ended(response, name))
        self._ending.add(task)  # asyncio itself holds tasks weakly
        task.add_done_callback(self._ending.discard)

    async def _of(self, name: str) -> Any:
        async with self._opening:
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
