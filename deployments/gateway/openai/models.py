"""GET /v1/models and /v1/models/{model}: the served models as the OpenAI API lists them."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.errors import ModelNotFound
from cluster.types import Deployment
from deployments.gateway.openai.answers import Model, ModelList

OWNER = "mmaas"


def listing(deployments: Iterable[Deployment]) -> ModelList:
    return {"object": "list", "data": [card(deployment) for deployment in deployments]}


def card(deployment: Deployment) -> Model:
    return {"id": deployment.name, "object": "model", "created": int(deployment.created_at), "owned_by": OWNER}


def find(deployments: Iterable[Deployment], name: str) -> Deployment:
    """Raises ModelNotFound that says what there is."""
    served = {deployment.name: deployment for deployment in deployments}
    if name in served:
        return served[name]
    known = ", ".join(sorted(served)) or "none yet"
    raise ModelNotFound(f"The model {name[:256]!r} does not exist. Served models: {known}.", param="model")
