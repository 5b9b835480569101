"""Rows to vectors, among the rows of other calls: the encoder's side of `deployments/batching/`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from cluster.errors import PlatformError
from deployments.batching.batches import Batches
from deployments.encode.row import Floats, Row


class Batcher:
    """Must be started on the event loop where it is used."""

    def __init__(self, run: Callable[[Sequence[Row]], Floats], width: int, *, target_s: float, limit: int) -> None:
        """`run` gets the rows of one step, in a thread of its own; `limit` is in tokens."""
        self._width = width
        self._batches = Batches[Row, Floats](lambda rows: checked(run(rows)), target_s=target_s, limit=limit, name="encoder")

    async def encode(self, tenant: bytes, rows: Sequence[Row]) -> Floats:
        """One vector a row. Raises what `Batches.submit` does, and PlatformError for numbers that aren't finite."""
        return (await self.metered(tenant, rows))[0]

    async def metered(self, tenant: bytes, rows: Sequence[Row]) -> tuple[Floats, int]:
        """The same, and the microseconds of the steps that were for them."""
        found, compute_us = await self._batches.submit(tenant, rows)
        vectors = np.empty((len(rows), self._width), np.float32)
        for place, vector in enumerate(found):
            vectors[place] = vector
        return vectors, compute_us

    @property
    def stats(self) -> dict[str, float]:
        counts = self._batches.stats
        return {**counts, "prompt_tokens": counts["tokens"]}

    @property
    def step_s(self) -> float:
        """How long the step that runs has been running."""
        return self._batches.step_s

    @property
    def is_dead(self) -> bool:
        return self._batches.is_dead

    async def close(self) -> None:
        await self._batches.close()


def checked(vectors: Floats) -> list[Floats | PlatformError]:
    """Each vector, or the error of the row that it is for."""
    wrong = PlatformError("the model gave numbers that are not finite", code="not_finite")
    fine: npt.NDArray[np.bool_] = np.all(np.isfinite(vectors), axis=1)
    return [vector if whole else wrong for vector, whole in zip(vectors, fine.tolist(), strict=True)]
