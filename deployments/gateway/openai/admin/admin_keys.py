"""Admin keys: the organization's own, and those of its users, which do no more than their users' roles allow."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cluster.tenancy.key_records import Key
from cluster.tenancy.keys import OVERLAP_S
from cluster.tenancy.permissions import EVERYTHING, OF_ADMIN_KEYS
from deployments.gateway.openai.admin import answers, forms, objects
from deployments.gateway.openai.admin.acting import Act, Id, Paged
from deployments.gateway.openai.answers import ErrorResponse
from deployments.gateway.responses import json_response
from deployments.gateway.routes import takes
from deployments.gateway.scopes import ScopedRoute, requires

router = APIRouter(route_class=ScopedRoute, tags=["administration"], responses={"default": {"model": ErrorResponse}})
KEYS = "/v1/organization/admin_api_keys"
KEY = f"{KEYS}/{{key_id}}"


@router.get(KEYS, response_model=objects.Cursor[objects.AdminKey])
@requires("admin_keys.read")
def list_admin_keys(request: Request, asked: Paged) -> Response:
    act = Act.of(request)
    organization = act.accounts.projects.organization(act.organization)
    found = act.accounts.keys.page(act.organization, None, asked)
    return json_response(answers.cursor(found, lambda key: answers.admin_key(key, organization)))


@router.post(KEYS, response_model=objects.NewAdminKey, openapi_extra=takes(forms.AdminKeyCreate))
@requires("admin_keys.write")
def create_admin_key(request: Request) -> Response:
    """The key is shown this once. Without `scopes` it may do what the caller's key may do in the organization."""
    act = Act.of(request)
    asked = act.form(forms.AdminKeyCreate)
    held = [EVERYTHING] if act.principal.can(EVERYTHING) else sorted(act.principal.scopes & OF_ADMIN_KEYS)
    scopes, ends_at = asked.scopes or held, act.ends_at(asked.expires_in_seconds)
    act.may_grant(scopes)
    key_id, text = act.accounts.keys.create_admin(act.organization, asked.name, scopes, ends_at, user=asked.user_id)
    return json_response({**_shown(act, _key(act, key_id)), "value": text})


@router.get(KEY, response_model=objects.AdminKey)
@requires("admin_keys.read")
def retrieve_admin_key(request: Request, key_id: Id) -> Response:
    act = Act.of(request)
    return json_response(_shown(act, _key(act, key_id)))


@router.post(f"{KEY}/rotate", response_model=objects.NewAdminKey, openapi_extra=takes(forms.Rotation, required=False))
@requires("admin_keys.write")
def rotate_admin_key(request: Request, key_id: Id) -> Response:
    """The key's successor, shown this once; both work for the overlap, a day unless said otherwise. Not in the official API."""
    act = Act.of(request)
    overlap = act.form(forms.Rotation).overlap_seconds
    act.may_grant(_key(act, key_id).scopes)
    new_id, text = act.accounts.keys.rotate(key_id, OVERLAP_S if overlap is None else overlap)
    return json_response({**_shown(act, _key(act, new_id)), "value": text})


@router.delete(KEY, response_model=objects.Deleted)
@requires("admin_keys.write")
def delete_admin_key(request: Request, key_id: Id) -> Response:
    act = Act.of(request)
    act.may_grant(_key(act, key_id).scopes)
    act.accounts.keys.revoke(key_id)
    return json_response(answers.deleted("organization.admin_api_key", key_id))


def _key(act: Act, key_id: str) -> Key:
    return act.accounts.keys.get(act.organization, None, key_id)


def _shown(act: Act, key: Key) -> objects.AdminKey:
    return answers.admin_key(key, act.accounts.projects.organization(act.organization))
