"""Server and models as the Open Inference Protocol describes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from cluster.errors import NotFound
from cluster.types import Adapter, Deployment, ModelRef
from deployments.gateway.openai.models import find
from deployments.models import Models

EXTENSIONS = ["binary_tensor_data", "model_repository", "model_repository(unload_dependents)"]
"""Triton's names of what is beyond the specification."""

Card = dict[str, Any]
Offered = tuple[Sequence[Deployment], Sequence[Adapter]]
"""Models and adapters that the caller may use."""


def server() -> Card:
    return {"name": "mmaas", "version": metadata.version("mmaas"), "extensions": EXTENSIONS}


async def described(models: Models, offered: Offered, name: str, version: str | None) -> Card:
    """A model's metadata. Raises ModelNotFound, NotFound for a version that isn't served, and Unavailable."""
    info = await _info(models, offered, name, version)
    tensors: list[Mapping[str, Any]] = [*info.get("inputs", []), *info.get("outputs", [])]
    platform = info.get("platform", "mmaas_encoder" if "width" in info else "mmaas_llm")
    num_inputs = len(info.get("inputs", []))
    shown = [{"name": one["name"], "datatype": one["datatype"], "shape": list(one["shape"])} for one in tensors]
    return {
        "name": name,
        "versions": [_version(info, _deployment(offered, name))],
        "platform": platform,
        "inputs": shown[:num_inputs],
        "outputs": shown[num_inputs:],
    }


async def is_ready(models: Models, offered: Offered, name: str, version: str | None) -> bool:
    """Whether it answers now, loaded. Raises ModelNotFound and NotFound."""
    base = (_deployment(offered, name)).name
    if not (await models.ready()).get(base):
        return False
    await _info(models, offered, name, version)
    return base not in await models.asleep()


async def index(models: Models, offered: Offered, *, only_ready: bool) -> list[Card]:
    """Every model that should be served, with its state (Triton's model repository extension)."""
    ready, asleep = await models.ready(), await models.asleep()
    cards = []
    for deployment in offered[0]:
        name = deployment.name
        reason = "it does not answer" if not ready.get(name) else "unloaded: a call loads it" if name in asleep else ""
        if not (only_ready and reason):
            info = await models.info(name) if ready.get(name) else {}
            version = _version(info, deployment)
            cards.append({"name": name, "version": version, "state": "UNAVAILABLE" if reason else "READY", "reason": reason})
    return cards


async def _info(models: Models, offered: Offered, name: str, version: str | None) -> Mapping[str, Any]:
    deployment, info = _deployment(offered, name), await models.info(name)
    if version is not None and version != (served := _version(info, deployment)):
        raise NotFound(f"The model {name[:256]!r} is served in version {served}.", param="version")
    return info


def _deployment(offered: Offered, name: str) -> Deployment:
    """Of BASE:ADAPTER its base's. Raises ModelNotFound."""
    found = find(*offered, name)
    return found if isinstance(found, Deployment) else next(one for one in offered[0] if one.name == found.base)


def _version(info: Mapping[str, Any], deployment: Deployment) -> str:
    """The library's, where the model or its reference tells it."""
    if "library_version" in info:
        return str(info["library_version"])
    try:
        return str(ModelRef.parse(deployment.model).version or 1)
    except ValueError:
        return "1"
