"""A project's rate limits and model permissions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from cluster.tenancy.rate_limits import RateLimit
from deployments.gateway import exchange, limits
from deployments.gateway.openai.admin import limits as wire
from deployments.gateway.openai.admin.acting import Act, Id
from deployments.gateway.openai.admin.limits import (
    PermissionsDeleted,
    PermissionUpdate,
    ProjectModelPermissions,
    ProjectRateLimit,
    RateLimitList,
    RateLimitUpdate,
)
from deployments.gateway.openai.admin.projects import PROJECT
from deployments.gateway.openai.answers import ErrorResponse
from deployments.gateway.responses import json_response
from deployments.gateway.routes import entrance, takes
from deployments.gateway.scopes import ScopedRoute, requires

router = APIRouter(route_class=ScopedRoute, tags=["administration"], responses={"default": {"model": ErrorResponse}})
RATE_LIMITS = f"{PROJECT}/rate_limits"
PERMISSIONS = f"{PROJECT}/model_permissions"


async def _served(request: Request) -> list[str]:
    return [deployment.name for deployment in await entrance(request).models.list()]


Served = Annotated[list[str], Depends(_served)]


@router.get(RATE_LIMITS, response_model=RateLimitList)
@requires("limits.read")
def list_rate_limits(request: Request, project_id: Id, served: Served) -> Response:
    """What each served model, and the project as a whole, is limited to."""
    return json_response(wire.page(_limits(Act.of(request), project_id, served), request.query_params))


@router.post(f"{RATE_LIMITS}/{{rate_limit_id}}", response_model=ProjectRateLimit, openapi_extra=takes(RateLimitUpdate))
@requires("limits.write")
def update_rate_limit(request: Request, project_id: Id, rate_limit_id: str, served: Served) -> Response:
    """Change a limit; it holds everywhere about a second later."""
    act = Act.of(request)
    changed = wire.changed(wire.found(_limits(act, project_id, served), project_id, rate_limit_id), _body(request))
    act.accounts.rate_limits.put(changed)
    return json_response(wire.rate_limit(changed))


@router.get(PERMISSIONS, response_model=ProjectModelPermissions)
@requires("limits.read")
def retrieve_model_permissions(request: Request, project_id: Id) -> Response:
    """The models that the project may use; without a policy, all: nothing is denied."""
    act = Act.of(request)
    project = act.accounts.projects.get(act.organization, project_id).id
    return json_response(wire.permissions(act.accounts.model_permissions.of(project)))


@router.post(PERMISSIONS, response_model=ProjectModelPermissions, openapi_extra=takes(PermissionUpdate))
@requires("limits.write")
def update_model_permissions(request: Request, project_id: Id) -> Response:
    """Say which models the project may use; it holds everywhere about a second later."""
    act = Act.of(request)
    project, asked = act.accounts.projects.get(act.organization, project_id).id, act.form(PermissionUpdate)
    said = act.accounts.model_permissions.put(project, asked.mode, asked.model_ids)
    return json_response(wire.permissions(said))


@router.delete(PERMISSIONS, response_model=PermissionsDeleted)
@requires("limits.write")
def delete_model_permissions(request: Request, project_id: Id) -> Response:
    """Take the policy away: the project may use every model."""
    act = Act.of(request)
    project = act.accounts.projects.get(act.organization, project_id).id
    deleted = act.accounts.model_permissions.delete(project)
    return json_response({"object": "project.model_permissions.deleted", "deleted": deleted})


def _limits(act: Act, project_id: str, served: list[str]) -> dict[str, RateLimit]:
    project = act.accounts.projects.get(act.organization, project_id).id
    return wire.everything(project, act.accounts.rate_limits.of(project), served)


def _body(request: Request) -> dict[str, object]:
    return limits.decode_json(exchange.of(request.scope).body, entrance(request).settings.max_json_depth)
