"""GET /v1/models and /v1/models/{model}: the served models, and their adapters, as the OpenAI API lists them."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.errors import ModelNotFound
from cluster.types import Adapter, Deployment
from deployments.gateway.openai.answers import Model, ModelList

OWNER = "mmaas"


def listing(deployments: Iterable[Deployment], adapters: Iterable[Adapter] = ()) -> ModelList:
    return {"object": "list", "data": [*map(card, deployments), *map(card, adapters)]}


def card(served: Deployment | Adapter) -> Model:
    if isinstance(served, Adapter):
        return {**_card(served.model, served.created_at), "parent": served.base}
    return _card(served.name, served.created_at)


def find(deployments: Iterable[Deployment], adapters: Iterable[Adapter], name: str) -> Deployment | Adapter:
    """Raises ModelNotFound that says what there is."""
    served: dict[str, Deployment | Adapter] = {deployment.name: deployment for deployment in deployments}
    known = ", ".join(sorted(served)) or "none yet"
    served |= {adapter.model: adapter for adapter in adapters}
    if name in served:
        return served[name]
    raise ModelNotFound(f"The model {name[:256]!r} does not exist. Served models: {known}.", param="model")


def _card(name: str, created_at: float) -> Model:
    return {"id": name, "object": "model", "created": int(created_at), "owned_by": OWNER}
