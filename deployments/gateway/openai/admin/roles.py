"""Roles of the organization and of its projects, and who is assigned which.

Assignments are asked for in four places alike: of users and of groups, in the organization and in a project.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cluster.tenancy.paging import Page
from cluster.tenancy.roles import Kind, cut
from deployments.gateway.openai.admin import answers, forms, objects, users
from deployments.gateway.openai.admin.acting import Act, Id, Paged
from deployments.gateway.openai.answers import ErrorResponse
from deployments.gateway.responses import json_response
from deployments.gateway.routes import takes
from deployments.gateway.scopes import ScopedRoute, requires

router = APIRouter(route_class=ScopedRoute, tags=["administration"], responses={"default": {"model": ErrorResponse}})
ORGANIZATION = "/v1/organization"
PROJECT = "/v1/projects/{project_id}"


@router.get(f"{ORGANIZATION}/roles", response_model=objects.Next[objects.Role])
@requires("roles.read")
def list_roles(request: Request, asked: Paged) -> Response:
    return _list(request, None, asked)


@router.get(f"{PROJECT}/roles", response_model=objects.Next[objects.Role])
@requires("roles.read")
def list_project_roles(request: Request, project_id: Id, asked: Paged) -> Response:
    return _list(request, project_id, asked)


@router.post(f"{ORGANIZATION}/roles", response_model=objects.Role, openapi_extra=takes(forms.RoleCreate))
@requires("roles.write")
def create_role(request: Request) -> Response:
    return _create(request, None)


@router.post(f"{PROJECT}/roles", response_model=objects.Role, openapi_extra=takes(forms.RoleCreate))
@requires("roles.write")
def create_project_role(request: Request, project_id: Id) -> Response:
    return _create(request, project_id)


@router.get(f"{ORGANIZATION}/roles/{{role_id}}", response_model=objects.Role)
@requires("roles.read")
def retrieve_role(request: Request, role_id: Id) -> Response:
    return _retrieve(request, None, role_id)


@router.get(f"{PROJECT}/roles/{{role_id}}", response_model=objects.Role)
@requires("roles.read")
def retrieve_project_role(request: Request, project_id: Id, role_id: Id) -> Response:
    return _retrieve(request, project_id, role_id)


@router.post(f"{ORGANIZATION}/roles/{{role_id}}", response_model=objects.Role, openapi_extra=takes(forms.RoleUpdate))
@requires("roles.write")
def update_role(request: Request, role_id: Id) -> Response:
    return _update(request, None, role_id)


@router.post(f"{PROJECT}/roles/{{role_id}}", response_model=objects.Role, openapi_extra=takes(forms.RoleUpdate))
@requires("roles.write")
def update_project_role(request: Request, project_id: Id, role_id: Id) -> Response:
    return _update(request, project_id, role_id)


@router.delete(f"{ORGANIZATION}/roles/{{role_id}}", response_model=objects.Deleted)
@requires("roles.write")
def delete_role(request: Request, role_id: Id) -> Response:
    return _delete(request, None, role_id)


@router.delete(f"{PROJECT}/roles/{{role_id}}", response_model=objects.Deleted)
@requires("roles.write")
def delete_project_role(request: Request, project_id: Id, role_id: Id) -> Response:
    return _delete(request, project_id, role_id)


def _list(request: Request, project: str | None, asked: Paged) -> Response:
    act = Act.of(request)
    return json_response(answers.following(act.accounts.roles.list(act.organization, project, asked), answers.role))


def _create(request: Request, project: str | None) -> Response:
    act = Act.of(request)
    asked = act.form(forms.RoleCreate)
    act.may_grant(asked.permissions)
    made = act.accounts.roles.create(act.organization, project, asked.role_name, asked.permissions, asked.description)
    return json_response(answers.role(made))


def _retrieve(request: Request, project: str | None, role: str) -> Response:
    act = Act.of(request)
    return json_response(answers.role(act.accounts.roles.get(act.organization, project, role)))


def _update(request: Request, project: str | None, role: str) -> Response:
    act = Act.of(request)
    asked = act.form(forms.RoleUpdate)
    act.may_grant(act.accounts.roles.get(act.organization, project, role).permissions)
    act.may_grant(asked.permissions or ())
    changes = {"name": asked.role_name, "description": asked.description}
    found = act.accounts.roles.update(act.organization, project, role, granted=asked.permissions, **changes)
    return json_response(answers.role(found))


def _delete(request: Request, project: str | None, role: str) -> Response:
    act = Act.of(request)
    act.may_grant(act.accounts.roles.get(act.organization, project, role).permissions)
    act.accounts.roles.delete(act.organization, project, role)
    return json_response(answers.deleted("role", role))


def _check_user(act: Act, project: str | None, user: str) -> None:
    """Raises NotFound for who isn't in the organization, or in the project."""
    act.accounts.users.get(act.organization, user)
    if project is not None:
        act.accounts.users.member(act.organization, project, user)


def _check_group(act: Act, project: str | None, group: str) -> None:
    """Raises NotFound for what isn't in the organization, or in the project."""
    act.accounts.groups.get(act.organization, group)
    if project is not None:
        act.accounts.groups.in_project(act.organization, project, group)


def _user_given(act: Act, holder: str) -> dict[str, Any]:
    return {"object": "user.role", "user": users.shown(act, act.accounts.users.get(act.organization, holder))}


def _group_given(act: Act, holder: str) -> dict[str, Any]:
    return {"object": "group.role", "group": answers.assignee_group(act.accounts.groups.get(act.organization, holder))}


CHECKS: dict[Kind, Callable[[Act, str | None, str], None]] = {"user": _check_user, "group": _check_group}
GIVEN: dict[Kind, Callable[[Act, str], dict[str, Any]]] = {"user": _user_given, "group": _group_given}


def _list_assigned(request: Request, kind: Kind, project: str | None, holder: str, asked: Paged) -> Response:
    act = Act.of(request)
    CHECKS[kind](act, project, holder)
    found: Page[Any] = cut(act.accounts.roles.assigned(act.organization, project, kind, holder), asked)
    return json_response(answers.following(found, lambda role: answers.assigned_role(role, [(kind, holder)])))


def _assign(request: Request, kind: Kind, project: str | None, holder: str) -> Response:
    act = Act.of(request)
    asked = act.form(forms.Assignment)
    CHECKS[kind](act, project, holder)
    role = act.accounts.roles.get(act.organization, project, asked.role_id)
    act.may_grant(role.permissions)
    act.accounts.roles.assign(act.organization, project, kind, holder, role.id)
    return json_response({**GIVEN[kind](act, holder), "role": answers.role(role)})


def _retrieve_assigned(request: Request, kind: Kind, project: str | None, holder: str, role_id: str) -> Response:
    act = Act.of(request)
    CHECKS[kind](act, project, holder)
    role = act.accounts.roles.find_assigned(act.organization, project, kind, holder, role_id)
    return json_response(answers.assigned_role(role, [(kind, holder)]))


def _take(request: Request, kind: Kind, project: str | None, holder: str, role_id: str) -> Response:
    act = Act.of(request)
    CHECKS[kind](act, project, holder)
    act.may_grant(act.accounts.roles.find_assigned(act.organization, project, kind, holder, role_id).permissions)
    act.accounts.roles.take(act.organization, project, kind, holder, role_id)
    return json_response(answers.removed(f"{kind}.role"))


def _add_in_organization(kind: Kind, given: Any) -> None:
    """The routes of roles that users, or groups, have in the organization."""
    path = f"{ORGANIZATION}/{kind}s/{{holder_id}}/roles"

    @router.get(path, response_model=objects.Next[objects.AssignedRole], name=f"list_{kind}_roles")
    @requires("roles.read")
    def list_assigned(request: Request, holder_id: Id, asked: Paged) -> Response:
        return _list_assigned(request, kind, None, holder_id, asked)

    @router.post(path, response_model=given, openapi_extra=takes(forms.Assignment), name=f"assign_{kind}_role")
    @requires("roles.write")
    def assign(request: Request, holder_id: Id) -> Response:
        return _assign(request, kind, None, holder_id)

    @router.get(f"{path}/{{role_id}}", response_model=objects.AssignedRole, name=f"retrieve_{kind}_role")
    @requires("roles.read")
    def retrieve_assigned(request: Request, holder_id: Id, role_id: Id) -> Response:
        return _retrieve_assigned(request, kind, None, holder_id, role_id)

    @router.delete(f"{path}/{{role_id}}", response_model=objects.Removed, name=f"take_{kind}_role")
    @requires("roles.write")
    def take(request: Request, holder_id: Id, role_id: Id) -> Response:
        return _take(request, kind, None, holder_id, role_id)


def _add_in_project(kind: Kind, given: Any) -> None:
    """The routes of roles that users, or groups, have in a project."""
    path = f"{PROJECT}/{kind}s/{{holder_id}}/roles"

    @router.get(path, response_model=objects.Next[objects.AssignedRole], name=f"list_project_{kind}_roles")
    @requires("roles.read")
    def list_assigned(request: Request, project_id: Id, holder_id: Id, asked: Paged) -> Response:
        return _list_assigned(request, kind, project_id, holder_id, asked)

    @router.post(path, response_model=given, openapi_extra=takes(forms.Assignment), name=f"assign_project_{kind}_role")
    @requires("roles.write")
    def assign(request: Request, project_id: Id, holder_id: Id) -> Response:
        return _assign(request, kind, project_id, holder_id)

    @router.get(f"{path}/{{role_id}}", response_model=objects.AssignedRole, name=f"retrieve_project_{kind}_role")
    @requires("roles.read")
    def retrieve_assigned(request: Request, project_id: Id, holder_id: Id, role_id: Id) -> Response:
        return _retrieve_assigned(request, kind, project_id, holder_id, role_id)

    @router.delete(f"{path}/{{role_id}}", response_model=objects.Removed, name=f"take_project_{kind}_role")
    @requires("roles.write")
    def take(request: Request, project_id: Id, holder_id: Id, role_id: Id) -> Response:
        return _take(request, kind, project_id, holder_id, role_id)


_add_in_organization("user", objects.UserRole)
_add_in_organization("group", objects.GroupRole)
_add_in_project("user", objects.UserRole)
_add_in_project("group", objects.GroupRole)
