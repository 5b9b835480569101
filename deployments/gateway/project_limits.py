"""Routes of the OpenAI administration API for a project's rate limits and model permissions. A route parses, calls and renders."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cluster.errors import NotFound
from cluster.tenancy.rate_limits import RateLimit
from deployments.gateway import exchange, limits
from deployments.gateway.administration import Administration
from deployments.gateway.entrance import Entrance
from deployments.gateway.openai import limits as wire
from deployments.gateway.openai.answers import ErrorResponse
from deployments.gateway.openai.documents import takes
from deployments.gateway.openai.limits import (
    PermissionsDeleted,
    PermissionUpdate,
    ProjectModelPermissions,
    ProjectRateLimit,
    RateLimitList,
    RateLimitUpdate,
)
from deployments.gateway.openai.types import parse
from deployments.gateway.responses import json_response
from deployments.gateway.scopes import ScopedRoute, requires

router = APIRouter(
    prefix="/v1/organization/projects/{project_id}",
    route_class=ScopedRoute,
    responses={"default": {"model": ErrorResponse}},
    tags=["limits"],
)
Result = TypeVar("Result")


@router.get("/rate_limits", response_model=RateLimitList)
@requires("admin")
async def list_rate_limits(request: Request, project_id: str) -> Response:
    """What each served model, and the project as a whole, is limited to."""
    found = await _limits(request, project_id)
    return json_response(wire.page(found, request.query_params))


@router.post("/rate_limits/{rate_limit_id}", response_model=ProjectRateLimit, openapi_extra=takes(RateLimitUpdate))
@requires("admin")
async def update_rate_limit(request: Request, project_id: str, rate_limit_id: str) -> Response:
    """Change a limit; it holds everywhere about a second later."""
    limit = wire.found(await _limits(request, project_id), project_id, rate_limit_id)
    changed = wire.changed(limit, await _body(request))
    await _do(request, project_id, lambda accounts: accounts.rates.put(changed))
    return json_response(wire.rate_limit(changed))


@router.get("/model_permissions", response_model=ProjectModelPermissions)
@requires("admin")
async def retrieve_model_permissions(request: Request, project_id: str) -> Response:
    """The models that the project may use; without a policy, all: nothing is denied."""
    return json_response(wire.permissions(await _do(request, project_id, lambda accounts: accounts.permissions.of(project_id))))


@router.post("/model_permissions", response_model=ProjectModelPermissions, openapi_extra=takes(PermissionUpdate))
@requires("admin")
async def update_model_permissions(request: Request, project_id: str) -> Response:
    """Say which models the project may use; it holds everywhere about a second later."""
    asked = parse(PermissionUpdate, await _body(request))
    said = await _do(request, project_id, lambda accounts: accounts.permissions.put(project_id, asked.mode, asked.model_ids))
    return json_response(wire.permissions(said))


@router.delete("/model_permissions", response_model=PermissionsDeleted)
@requires("admin")
async def delete_model_permissions(request: Request, project_id: str) -> Response:
    """Take the policy away: the project may use every model."""
    deleted = await _do(request, project_id, lambda accounts: accounts.permissions.delete(project_id))
    return json_response({"object": "project.model_permissions.deleted", "deleted": deleted})


async def _limits(request: Request, project: str) -> dict[str, RateLimit]:
    rows = await _do(request, project, lambda accounts: accounts.rates.of(project))
    entrance: Entrance = request.app.state.entrance
    return wire.everything(project, rows, [deployment.name for deployment in await entrance.models.list()])


async def _do(request: Request, project: str, work: Callable[[Administration], Result]) -> Result:
    """`work` beside the event loop. Raises NotFound for a project that isn't there."""
    entrance: Entrance = request.app.state.entrance
    accounts = entrance.accounts.administration

    def do() -> Result:
        if accounts is None or not accounts.has_project(project):
            raise NotFound("There is no such project.", param="project_id")
        return work(accounts)

    return await asyncio.to_thread(do)


async def _body(request: Request) -> dict[str, object]:
    entrance: Entrance = request.app.state.entrance
    return await limits.read_json(exchange.of(request.scope).body, entrance.settings.max_json_depth)
