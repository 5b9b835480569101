"""The served models as the gateway sees them, whoever serves them. `router.ServeModels` is the implementation over Ray Serve."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cluster.types import Adapter, Chunk, Deployment, Encode, Encoded, Generate, Predict, Predicted

Word = Literal["sleep", "wake"]


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
