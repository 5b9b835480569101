"""The audit log, for who may read it."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cluster.errors import NotFound
from deployments.gateway.openai.admin import audit_logs
from deployments.gateway.openai.admin.acting import Act
from deployments.gateway.openai.answers import AuditLogs, ErrorResponse
from deployments.gateway.responses import json_response
from deployments.gateway.routes import entrance
from deployments.gateway.scopes import ScopedRoute, requires

router = APIRouter(route_class=ScopedRoute, tags=["administration"], responses={"default": {"model": ErrorResponse}})


@router.get("/v1/organization/audit_logs", response_model=AuditLogs, openapi_extra={"parameters": audit_logs.PARAMETERS})
@requires("audit.read")
def list_audit_logs(request: Request) -> Response:
    """What was done and denied in the organization, the newest first."""
    act, audit = Act.of(request), entrance(request).tenancy.audit
    if audit is None:
        raise NotFound("This gateway has no audit log.")
    asked = audit_logs.Asked.of(request.query_params.multi_items(), act.organization)
    return json_response(audit_logs.listing(*audit.list(asked.wanted, limit=asked.limit, after=asked.after, before=asked.before)))
