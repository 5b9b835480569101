"""From tensors to a model's answer, the same for HTTP and for handles. What is long is done beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from cluster.errors import DeadlineExceeded
from cluster.types import Predicted
from deployments.gateway import limiting
from deployments.gateway.entrance import Entrance
from deployments.gateway.exchange import Exchange
from deployments.gateway.limits import OFF_LOOP_BYTES
from deployments.gateway.oip.infer import InferCall

Done = TypeVar("Done")


async def predicted(entrance: Entrance, call: InferCall, notes: Exchange) -> Predicted:
    """Raises PlatformError. Cancelling this cancels the model's work."""
    notes.model, seconds = call.model, entrance.settings.max_stream_s
    async with limiting.admitted(entrance, notes, call.model, [call.asked]) as models:
        try:
            async with asyncio.timeout(seconds):
                found = await models.predict(call.model, call.asked)
        except TimeoutError:
            raise DeadlineExceeded(f"The answer took longer than {seconds:g} s.") from None
        notes.rows, notes.compute_us = found.rows, found.usage.compute_us
        return found


async def beside(num_bytes: int, work: Callable[[], Done]) -> Done:
    """The result of `work`, in a thread where it has much to do."""
    return work() if num_bytes < OFF_LOOP_BYTES else await asyncio.to_thread(work)


def size_of(found: Predicted) -> int:
    """Bytes of the tensors of an answer."""
    return sum(len(tensor.data) for tensor in found.outputs)
