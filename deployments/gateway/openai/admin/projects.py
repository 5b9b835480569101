"""Projects, their service accounts and their keys."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from cluster.tenancy.keys import OVERLAP_S
from cluster.tenancy.permissions import INFERENCE
from deployments.gateway.openai.admin import answers, forms, objects
from deployments.gateway.openai.admin.acting import Act, Id, Paged
from deployments.gateway.openai.answers import ErrorResponse
from deployments.gateway.responses import json_response
from deployments.gateway.routes import takes
from deployments.gateway.scopes import ScopedRoute, requires

router = APIRouter(route_class=ScopedRoute, tags=["administration"], responses={"default": {"model": ErrorResponse}})
PROJECTS = "/v1/organization/projects"
PROJECT = f"{PROJECTS}/{{project_id}}"
ACCOUNTS = f"{PROJECT}/service_accounts"
KEYS = f"{PROJECT}/api_keys"


@router.get(PROJECTS, response_model=objects.Cursor[objects.Project])
@requires("projects.read")
def list_projects(request: Request, asked: Paged, include_archived: bool = False) -> Response:
    act = Act.of(request)
    found = act.accounts.projects.list(act.organization, asked, include_archived=include_archived)
    return json_response(answers.cursor(found, answers.project))


@router.post(PROJECTS, response_model=objects.Project, openapi_extra=takes(forms.ProjectCreate))
@requires("projects.write")
def create_project(request: Request) -> Response:
    act = Act.of(request)
    made = act.accounts.projects.create(act.organization, act.form(forms.ProjectCreate).name)
    return json_response(answers.project(made))


@router.get(PROJECT, response_model=objects.Project)
@requires("projects.read")
def retrieve_project(request: Request, project_id: Id) -> Response:
    act = Act.of(request)
    return json_response(answers.project(act.accounts.projects.get(act.organization, project_id)))


@router.post(PROJECT, response_model=objects.Project, openapi_extra=takes(forms.ProjectUpdate))
@requires("projects.write")
def update_project(request: Request, project_id: Id) -> Response:
    act = Act.of(request)
    found, name = act.accounts.projects.get(act.organization, project_id), act.form(forms.ProjectUpdate).name
    if name is not None:
        found = act.accounts.projects.rename(act.organization, project_id, name)
    return json_response(answers.project(found))


@router.post(f"{PROJECT}/archive", response_model=objects.Project)
@requires("projects.write")
def archive_project(request: Request, project_id: Id) -> Response:
    """Its keys end with it, for good."""
    act = Act.of(request)
    found = act.accounts.projects.archive(act.organization, project_id)
    return json_response(answers.project(found))


@router.get(ACCOUNTS, response_model=objects.Cursor[objects.ServiceAccount])
@requires("keys.read")
def list_service_accounts(request: Request, project_id: Id, asked: Paged) -> Response:
    act = Act.of(request)
    found = act.accounts.service_accounts.list(act.organization, project_id, asked)
    return json_response(answers.cursor(found, answers.service_account))


@router.post(ACCOUNTS, response_model=objects.NewServiceAccount, openapi_extra=takes(forms.ServiceAccountCreate))
@requires("keys.write")
def create_service_account(request: Request, project_id: Id) -> Response:
    """With a key, which is shown this once, unless only the account is asked for."""
    act = Act.of(request)
    asked = act.form(forms.ServiceAccountCreate)
    if asked.create_service_account_only:
        account = act.accounts.service_accounts.create(act.organization, project_id, asked.name)
        return json_response({**answers.service_account(account), "api_key": None})
    act.accounts.projects.get(act.organization, project_id)
    ends_at = act.ends_at(asked.expires_in_seconds)
    scopes = asked.scopes or [INFERENCE]
    key_id, text = act.accounts.keys.create(project_id, asked.name, scopes, ends_at, models=asked.models)
    key = act.accounts.keys.get(act.organization, project_id, key_id)
    assert key.owner is not None
    account = act.accounts.service_accounts.get(act.organization, project_id, key.owner.id)
    shown = {**answers.service_account(account), "api_key": answers.new_key(key, text)}
    return json_response(shown)


@router.get(f"{ACCOUNTS}/{{service_account_id}}", response_model=objects.ServiceAccount)
@requires("keys.read")
def retrieve_service_account(request: Request, project_id: Id, service_account_id: Id) -> Response:
    act = Act.of(request)
    found = act.accounts.service_accounts.get(act.organization, project_id, service_account_id)
    return json_response(answers.service_account(found))


@router.post(
    f"{ACCOUNTS}/{{service_account_id}}",
    response_model=objects.ServiceAccount,
    openapi_extra=takes(forms.ServiceAccountUpdate),
)
@requires("keys.write")
def update_service_account(request: Request, project_id: Id, service_account_id: Id) -> Response:
    act = Act.of(request)
    asked = act.form(forms.ServiceAccountUpdate)
    verb = act.accounts.service_accounts.update
    found = verb(act.organization, project_id, service_account_id, name=asked.name, role=asked.role)
    return json_response(answers.service_account(found))


@router.delete(f"{ACCOUNTS}/{{service_account_id}}", response_model=objects.Deleted)
@requires("keys.write")
def delete_service_account(request: Request, project_id: Id, service_account_id: Id) -> Response:
    """Its keys end with it."""
    act = Act.of(request)
    act.accounts.service_accounts.delete(act.organization, project_id, service_account_id)
    shown = answers.deleted("organization.project.service_account", service_account_id)
    return json_response(shown)


@router.post(
    f"{ACCOUNTS}/{{service_account_id}}/api_keys",
    response_model=objects.NewKey,
    openapi_extra=takes(forms.KeyCreate, required=False),
)
@requires("keys.write")
def create_key(request: Request, project_id: Id, service_account_id: Id) -> Response:
    """The key is shown this once."""
    act = Act.of(request)
    asked, keys = act.form(forms.KeyCreate), act.accounts.keys
    account = act.accounts.service_accounts.get(act.organization, project_id, service_account_id).id
    ends_at, scopes = act.ends_at(asked.expires_in_seconds), asked.scopes or [INFERENCE]
    key_id, text = keys.create(project_id, asked.name, scopes, ends_at, models=asked.models, service_account=account)
    made = keys.get(act.organization, project_id, key_id)
    return json_response(answers.new_key(made, text))


@router.get(KEYS, response_model=objects.Cursor[objects.ProjectKey])
@requires("keys.read")
def list_keys(
    request: Request,
    project_id: Id,
    asked: Paged,
    owner_project_access: Annotated[Literal["active", "inactive", "any"], Query()] = "any",
) -> Response:
    act = Act.of(request)
    has_owner = None if owner_project_access == "any" else owner_project_access == "active"
    found = act.accounts.keys.page(act.organization, project_id, asked, has_owner=has_owner)
    return json_response(answers.cursor(found, answers.project_key))


@router.get(f"{KEYS}/{{api_key_id}}", response_model=objects.ProjectKey)
@requires("keys.read")
def retrieve_key(request: Request, project_id: Id, api_key_id: Id) -> Response:
    act = Act.of(request)
    return json_response(answers.project_key(act.accounts.keys.get(act.organization, project_id, api_key_id)))


@router.post(f"{KEYS}/{{api_key_id}}", response_model=objects.ProjectKey, openapi_extra=takes(forms.KeyUpdate))
@requires("keys.write")
def update_key(request: Request, project_id: Id, api_key_id: Id) -> Response:
    act = Act.of(request)
    asked = act.form(forms.KeyUpdate)
    found = act.accounts.keys.update(
        act.organization,
        project_id,
        api_key_id,
        scopes=asked.scopes,
        expires_at=act.ends_at(asked.expires_in_seconds),
        models=asked.models,
    )
    return json_response(answers.project_key(found))


@router.post(f"{KEYS}/{{api_key_id}}/rotate", response_model=objects.NewKey, openapi_extra=takes(forms.Rotation, required=False))
@requires("keys.write")
def rotate_key(request: Request, project_id: Id, api_key_id: Id) -> Response:
    """The key's successor, shown this once; both work for the overlap, a day unless said otherwise. Not in the official API."""
    act = Act.of(request)
    overlap = act.form(forms.Rotation).overlap_seconds
    act.accounts.keys.get(act.organization, project_id, api_key_id)
    new_id, text = act.accounts.keys.rotate(api_key_id, OVERLAP_S if overlap is None else overlap)
    made = act.accounts.keys.get(act.organization, project_id, new_id)
    return json_response(answers.new_key(made, text))


@router.delete(f"{KEYS}/{{api_key_id}}", response_model=objects.Deleted)
@requires("keys.write")
def delete_key(request: Request, project_id: Id, api_key_id: Id) -> Response:
    act = Act.of(request)
    act.accounts.keys.get(act.organization, project_id, api_key_id)
    act.accounts.keys.revoke(api_key_id)
    return json_response(answers.deleted("organization.project.api_key", api_key_id))
