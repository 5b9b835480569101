"""Groups, who is in them, and the projects that they are in."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from deployments.gateway.openai.admin import answers, forms, objects
from deployments.gateway.openai.admin.acting import Act, Id, Paged
from deployments.gateway.openai.answers import ErrorResponse
from deployments.gateway.responses import json_response
from deployments.gateway.routes import takes
from deployments.gateway.scopes import ScopedRoute, requires

router = APIRouter(route_class=ScopedRoute, tags=["administration"], responses={"default": {"model": ErrorResponse}})
GROUPS = "/v1/organization/groups"
GROUP = f"{GROUPS}/{{group_id}}"
USERS = f"{GROUP}/users"
IN_PROJECT = "/v1/organization/projects/{project_id}/groups"


@router.get(GROUPS, response_model=objects.Next[objects.Group])
@requires("users.read")
def list_groups(request: Request, asked: Paged) -> Response:
    act = Act.of(request)
    return json_response(answers.following(act.accounts.groups.list(act.organization, asked), answers.group))


@router.post(GROUPS, response_model=objects.Group, openapi_extra=takes(forms.GroupName))
@requires("users.write")
def create_group(request: Request) -> Response:
    act = Act.of(request)
    made = act.accounts.groups.create(act.organization, act.form(forms.GroupName).name)
    return json_response(answers.group(made))


@router.get(GROUP, response_model=objects.Group)
@requires("users.read")
def retrieve_group(request: Request, group_id: Id) -> Response:
    act = Act.of(request)
    return json_response(answers.group(act.accounts.groups.get(act.organization, group_id)))


@router.post(GROUP, response_model=objects.Group, openapi_extra=takes(forms.GroupName))
@requires("users.write")
def update_group(request: Request, group_id: Id) -> Response:
    act = Act.of(request)
    found = act.accounts.groups.rename(act.organization, group_id, act.form(forms.GroupName).name)
    return json_response(answers.group(found))


@router.delete(GROUP, response_model=objects.Deleted)
@requires("users.write")
def delete_group(request: Request, group_id: Id) -> Response:
    """Its users lose what they had through it."""
    act = Act.of(request)
    _may_touch(act, group_id)
    act.accounts.groups.delete(act.organization, group_id)
    return json_response(answers.deleted("group", group_id))


@router.get(USERS, response_model=objects.Next[objects.GroupMember])
@requires("users.read")
def list_group_users(request: Request, group_id: Id, asked: Paged) -> Response:
    act = Act.of(request)
    return json_response(answers.following(act.accounts.groups.users(act.organization, group_id, asked), answers.group_member))


@router.post(USERS, response_model=objects.GroupUser, openapi_extra=takes(forms.GroupUser))
@requires("users.write")
def create_group_user(request: Request, group_id: Id) -> Response:
    """The user gets what the group has."""
    act = Act.of(request)
    user_id = act.form(forms.GroupUser).user_id
    _may_touch(act, group_id)
    added = act.accounts.groups.add(act.organization, group_id, user_id)
    return json_response({"object": "group.user", "user_id": added.id, "group_id": group_id})


@router.get(f"{USERS}/{{user_id}}", response_model=objects.GroupMember)
@requires("users.read")
def retrieve_group_user(request: Request, group_id: Id, user_id: Id) -> Response:
    act = Act.of(request)
    return json_response(answers.group_member(act.accounts.groups.user(act.organization, group_id, user_id)))


@router.delete(f"{USERS}/{{user_id}}", response_model=objects.Removed)
@requires("users.write")
def delete_group_user(request: Request, group_id: Id, user_id: Id) -> Response:
    act = Act.of(request)
    _may_touch(act, group_id)
    act.accounts.groups.remove(act.organization, group_id, user_id)
    return json_response(answers.removed("group.user"))


@router.get(IN_PROJECT, response_model=objects.Next[objects.ProjectGroup])
@requires("users.read")
def list_project_groups(request: Request, project_id: Id, asked: Paged) -> Response:
    act = Act.of(request)
    found = act.accounts.groups.of_project(act.organization, project_id, asked)
    return json_response(answers.following(found, answers.project_group, "group_id"))


@router.post(IN_PROJECT, response_model=objects.ProjectGroup, openapi_extra=takes(forms.GroupJoin))
@requires("users.write")
def create_project_group(request: Request, project_id: Id) -> Response:
    """Every user of the group into the project, with this role."""
    act = Act.of(request)
    asked = act.form(forms.GroupJoin)
    made = act.accounts.groups.join(act.organization, project_id, asked.group_id, asked.role)
    return json_response(answers.project_group(made))


@router.get(f"{IN_PROJECT}/{{group_id}}", response_model=objects.ProjectGroup)
@requires("users.read")
def retrieve_project_group(
    request: Request, project_id: Id, group_id: Id, group_type: Literal["group", "tenant_group"] = "group"
) -> Response:
    """`group_type` is the official API's; there are only plain groups here."""
    act = Act.of(request)
    return json_response(answers.project_group(act.accounts.groups.in_project(act.organization, project_id, group_id)))


@router.delete(f"{IN_PROJECT}/{{group_id}}", response_model=objects.Removed)
@requires("users.write")
def delete_project_group(request: Request, project_id: Id, group_id: Id) -> Response:
    act = Act.of(request)
    act.accounts.groups.leave(act.organization, project_id, group_id)
    return json_response(answers.removed("project.group"))


def _may_touch(act: Act, group: str) -> None:
    """Raises Forbidden when the group gives more than the actor holds."""
    act.may_grant(act.accounts.permissions(act.organization, "group", group))
