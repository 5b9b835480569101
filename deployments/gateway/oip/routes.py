"""The routes of the Open Inference Protocol v2: served models beside /v1, with the same keys, scopes, bounds and records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from deployments.gateway import exchange, limiting, predicting
from deployments.gateway.oip import models, wire
from deployments.gateway.oip.infer import InferCall
from deployments.gateway.oip.types import IndexRequest, InferRequest, LoadRequest
from deployments.gateway.oip.wire import Body
from deployments.gateway.openai.types import parse
from deployments.gateway.responses import json_response
from deployments.gateway.routes import entrance, takes
from deployments.gateway.scopes import PUBLIC, ScopedRoute, requires
from deployments.gateway.telling import tell
from deployments.models import Word

TAGS: list[Any] = ["open inference protocol"]
MODEL, VERSION = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"

Made = TypeVar("Made")


class Failure(TypedDict):
    error: str


router = APIRouter(route_class=ScopedRoute, responses={"default": {"model": Failure}})


@router.get("/v2/health/live", tags=TAGS)
@requires(PUBLIC)
async def live() -> Response:
    """The process answers."""
    return json_response({"live": True})


@router.get("/v2/health/ready", tags=TAGS)
@requires(PUBLIC)
async def ready(request: Request) -> Response:
    """200 when every model that should be served answers."""
    states = await entrance(request).models.ready()
    if all(states.values()):
        return json_response({"ready": True})
    return json_response({"ready": False, "error": "not every model answers"}, 503)


@router.get("/v2", tags=TAGS)
@router.get("/v2/", tags=TAGS, include_in_schema=False)
@requires("inference")
async def server_metadata() -> Response:
    """Name, version and extensions."""
    return json_response(models.server())


@router.get(MODEL, tags=TAGS)
@router.get(VERSION, tags=TAGS)
@requires("inference")
async def model_metadata(request: Request, model: str) -> Response:
    """What a model takes and gives."""
    return json_response(await models.described(entrance(request).models, await _offered(request), model, _version(request)))


@router.get(MODEL + "/ready", tags=TAGS)
@router.get(VERSION + "/ready", tags=TAGS)
@requires("inference")
async def model_ready(request: Request, model: str) -> Response:
    """200 when a model answers without being loaded first."""
    if await models.is_ready(entrance(request).models, await _offered(request), model, _version(request)):
        return json_response({"name": model, "ready": True})
    return json_response({"name": model, "ready": False, "error": "the model is not ready"}, 503)


@router.post(MODEL + "/infer", tags=TAGS, openapi_extra=takes(InferRequest))
@router.post(VERSION + "/infer", tags=TAGS, openapi_extra=takes(InferRequest))
@requires("inference")
async def infer(request: Request, model: str) -> Response:
    """Tensors for tensors, as JSON or as raw bytes behind it."""
    notes = exchange.of(request.scope)
    facts: dict[str, Any] = {"request_id": notes.request_id, "tenant": notes.tenant}
    call = await _read(request, lambda body: InferCall(model, _version(request), body, **facts))
    found = await predicting.predicted(entrance(request), call, notes)
    accepted = request.headers.get("accept-encoding", "")
    reply = await predicting.beside(predicting.size_of(found), lambda: wire.written(*call.answer(found), accepted))
    return Response(reply.content, headers=reply.headers)


@router.post("/v2/repository/index", tags=TAGS, openapi_extra=takes(IndexRequest))
@requires("inference")
async def repository_index(request: Request) -> Response:
    """Every model that should be served, and its state."""
    asked = await _read(request, lambda body: parse(IndexRequest, body.tree))
    return json_response(await models.index(entrance(request).models, await _offered(request), only_ready=bool(asked.ready)))


@router.post("/v2/repository/models/{model}/load", tags=TAGS, openapi_extra=takes(LoadRequest))
@requires("admin")
async def load(request: Request, model: str) -> Response:
    """Load a model that was unloaded, as `mmaas wake` does."""
    return await _tell(request, model, "wake")


@router.post("/v2/repository/models/{model}/unload", tags=TAGS, openapi_extra=takes(LoadRequest))
@requires("admin")
async def unload(request: Request, model: str) -> Response:
    """Give a model's memory back until it is loaded or called again, as `mmaas sleep` does."""
    return await _tell(request, model, "sleep")


async def _offered(request: Request) -> models.Offered:
    return await limiting.permitted(entrance(request), exchange.of(request.scope))


def _version(request: Request) -> str | None:
    version: str | None = request.path_params.get("version")
    return version


async def _tell(request: Request, model: str, word: Word) -> Response:
    await _read(request, lambda body: parse(LoadRequest, body.tree))
    await tell(request, model, word)
    return json_response({})


async def _read(request: Request, made: Callable[[Body], Made]) -> Made:
    """What `made` makes of the body, beside the event loop for a long one. A packed one may become long."""
    notes, bounds = exchange.of(request.scope), entrance(request).settings

    def work() -> Made:
        body = wire.read(notes.body, request.headers, max_bytes=bounds.max_body_bytes, max_depth=bounds.max_json_depth)
        return made(body)

    is_packed = "content-encoding" in request.headers
    return await predicting.beside(bounds.max_body_bytes if is_packed else len(notes.body), work)
