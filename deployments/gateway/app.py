"""The HTTP application: routes and nothing else. A route parses, calls and renders; `middleware.py` did the rest before.

`build_app` composes without Ray, so that the same application runs in a Serve replica and under a plain uvicorn in a test.
"""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from cluster import metrics
from cluster.errors import InvalidRequest
from cluster.settings import GatewaySettings
from deployments.gateway import answering, document, encoding, errors, exchange, limiting, limits, middleware
from deployments.gateway.entrance import KEEPALIVE_S, Entrance
from deployments.gateway.keys import Verify
from deployments.gateway.oip import routes as oip
from deployments.gateway.openai import models
from deployments.gateway.openai.admin import routes as admin
from deployments.gateway.openai.answers import ChatCompletion, Completion, ErrorResponse, Model, ModelList
from deployments.gateway.openai.encoding import (
    Classification,
    ClassifyRequest,
    EmbeddingList,
    EmbeddingRequest,
    Ranking,
    RerankRequest,
)
from deployments.gateway.openai.types import ChatRequest, CompletionRequest
from deployments.gateway.responses import event_stream, json_response
from deployments.gateway.routes import entrance, takes
from deployments.gateway.scopes import PUBLIC, ScopedRoute, public_paths, requires
from deployments.gateway.telling import tell
from deployments.gateway.tenancy import NONE, Tenancy
from deployments.models import Models

router = APIRouter(route_class=ScopedRoute, responses={"default": {"model": ErrorResponse}})


@router.get("/health", tags=["operation"])
@requires(PUBLIC)
async def health() -> Response:
    """The process is alive."""
    return json_response({"status": "ok"})


@router.get("/ready", tags=["operation"], responses={503: {"description": "No model answers", "content": {"application/json": {}}}})
@requires(PUBLIC)
async def ready(request: Request) -> Response:
    """200 when at least one model answers."""
    models = entrance(request).models
    states, asleep = await models.ready(), await models.asleep()
    return json_response({"ready": any(states.values()), "models": states, "asleep": asleep}, 200 if any(states.values()) else 503)


@router.get("/metrics", tags=["operation"], response_class=PlainTextResponse)
@requires("admin")
async def prometheus(request: Request) -> Response:
    """This process and the engines behind it in Prometheus' text format."""
    text, content_type = metrics.exposition(await entrance(request).models.stats())
    return Response(text, media_type=content_type)


@router.get("/v1/models", tags=["models"], response_model=ModelList)
@requires("inference")
async def list_models(request: Request) -> Response:
    """The served models and their adapters."""
    return json_response(models.listing(*await limiting.permitted(entrance(request), exchange.of(request.scope))))


@router.get("/v1/models/{model:path}", tags=["models"], response_model=Model)
@requires("inference")
async def retrieve_model(request: Request, model: str) -> Response:
    """One served model or adapter."""
    permitted = await limiting.permitted(entrance(request), exchange.of(request.scope))
    return json_response(models.card(models.find(*permitted, model)))


@router.post("/v1/models/{model}/sleep", tags=["operation"], status_code=204)
@requires("admin")
async def put_to_sleep(request: Request, model: str) -> Response:
    """Give a model's memory back to the system until it is asked for something, or woken."""
    await tell(request, model, "sleep")
    return Response(status_code=204)


@router.post("/v1/models/{model}/wake", tags=["operation"], status_code=204)
@requires("admin")
async def wake_up(request: Request, model: str) -> Response:
    """Load a sleeping model again."""
    await tell(request, model, "wake")
    return Response(status_code=204)


@router.post("/v1/chat/completions", tags=["chat"], response_model=ChatCompletion, openapi_extra=takes(ChatRequest))
@requires("inference")
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, at once or as a stream of server-sent events."""
    return await generate(request, "chat.completions")


@router.post("/v1/completions", tags=["completions"], response_model=Completion, openapi_extra=takes(CompletionRequest))
@requires("inference")
async def create_completion(request: Request) -> Response:
    """Continue one or several prompts, at once or as a stream of server-sent events."""
    return await generate(request, "completions")


@router.post("/v1/embeddings", tags=["encoders"], response_model=EmbeddingList, openapi_extra=takes(EmbeddingRequest))
@requires("inference")
async def create_embeddings(request: Request) -> Response:
    """One vector for each text or list of token ids."""
    return await encode(request, "embeddings")


@router.post("/v1/rerank", tags=["encoders"], response_model=Ranking, openapi_extra=takes(RerankRequest))
@requires("inference")
async def rerank(request: Request) -> Response:
    """Documents by how well they answer a query, the best first."""
    return await encode(request, "rerank")


@router.post("/v1/classify", tags=["encoders"], response_model=Classification, openapi_extra=takes(ClassifyRequest))
@requires("inference")
async def classify(request: Request) -> Response:
    """The likeliest label of each text, and the probability of every label."""
    return await encode(request, "classify")


router.routes.extend(oip.router.routes)


async def encode(request: Request, operation: str) -> Response:
    parts, notes = entrance(request), exchange.of(request.scope)
    body = await limits.read_json(notes.body, parts.settings.max_json_depth)
    answer = await encoding.rendered(parts, operation, body, notes)
    return Response(answer, media_type="application/json")


async def generate(request: Request, operation: str) -> Response:
    parts, notes = entrance(request), exchange.of(request.scope)
    body = await limits.read_json(notes.body, parts.settings.max_json_depth)
    call = answering.parse(operation, body, notes)
    if call.streams:
        return await event_stream(answering.parts(parts, call, notes, parts.keepalive_s))
    return json_response(await answering.whole(parts, call, notes))


def build_app(
    models: Models,
    verify_key: Verify,
    settings: GatewaySettings,
    *,
    tenancy: Tenancy = NONE,
    keepalive_s: float = KEEPALIVE_S,
) -> FastAPI:
    """Raises TypeError when a route exists that nobody declared a scope for."""
    shared = Entrance.of(models, verify_key, settings, tenancy, keepalive_s)
    routes = [*router.routes, *(admin.routes if tenancy.accounts is not None else ())]
    public = public_paths(routes)
    app = FastAPI(
        title="MMaaS",
        version="1",
        redirect_slashes=False,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # FastAPI's own; even idle it looks for it in every call
        exception_handlers={HTTPException: _refused, RequestValidationError: _invalid},
        middleware=middleware.pipeline(
            gate=shared.gate,
            keys=shared.keys,
            public=public,
            max_body_bytes=settings.max_body_bytes,
            hosts=frozenset(name.lower() for name in settings.names),
            tenancy=tenancy,
            paths=frozenset(route.path for route in routes if isinstance(route, ScopedRoute)),
        ),
    )
    app.router.routes.extend(routes)  # not include_router, which hides them from the check below
    public_paths(app.routes)
    app.state.entrance = shared
    app.openapi = partial(document.openapi, app)  # type: ignore[method-assign]
    return app


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    raise errors.from_http(error) from None


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    raise InvalidRequest(problem["msg"], param=errors.path(problem["loc"][1:])) from None
