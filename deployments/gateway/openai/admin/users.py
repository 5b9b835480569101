"""Users of the organization and of its projects, and the invitations by which they come."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from cluster.errors import InvalidRequest, NotFound
from cluster.tenancy.users import Member, User
from deployments.gateway.openai.admin import answers, forms, objects
from deployments.gateway.openai.admin.acting import Act, Id, Paged
from deployments.gateway.openai.answers import ErrorResponse
from deployments.gateway.responses import json_response
from deployments.gateway.routes import takes
from deployments.gateway.scopes import ScopedRoute, requires

router = APIRouter(route_class=ScopedRoute, tags=["administration"], responses={"default": {"model": ErrorResponse}})
USERS = "/v1/organization/users"
MEMBERS = "/v1/organization/projects/{project_id}/users"
INVITES = "/v1/organization/invites"
Emails = Annotated[list[str] | None, Query(max_length=100)]
EmailsInBrackets = Annotated[list[str] | None, Query(max_length=100, alias="emails[]")]


@router.get(USERS, response_model=objects.Cursor[objects.User])
@requires("users.read")
def list_users(request: Request, asked: Paged, emails: Emails = None, emails_in_brackets: EmailsInBrackets = None) -> Response:
    """`emails` can be repeated, with or without brackets: the official clients write `emails[]`."""
    act = Act.of(request)
    wanted = [email for email in (*(emails or ()), *(emails_in_brackets or ())) if email.isprintable()]
    if (emails or emails_in_brackets) and not wanted:
        raise InvalidRequest("emails are addresses.", param="emails")
    found, names = act.accounts.users.list(act.organization, asked, wanted), act.accounts.roles.names(act.organization, None)
    return json_response(answers.cursor(found, lambda user: answers.user(user, names[user.role_id])))


@router.get(f"{USERS}/{{user_id}}", response_model=objects.User)
@requires("users.read")
def retrieve_user(request: Request, user_id: Id) -> Response:
    """With the projects that the user is in by name."""
    act = Act.of(request)
    found = act.accounts.users.get(act.organization, user_id)
    inside = [_project(act, member) for member in act.accounts.users.memberships(act.organization, user_id)]
    return json_response({**shown(act, found), "projects": {"object": "list", "data": inside}})


@router.post(f"{USERS}/{{user_id}}", response_model=objects.User, openapi_extra=takes(forms.UserUpdate))
@requires("users.write")
def update_user(request: Request, user_id: Id) -> Response:
    """`role_id` names a role by its id, `role` by its name or id."""
    act = Act.of(request)
    asked = act.form(forms.UserUpdate)
    found, named = act.accounts.users.get(act.organization, user_id), asked.role_id or asked.role
    if named is not None:
        act.may_touch(user_id)
        role = act.accounts.roles.resolve(act.organization, None, named)
        act.may_grant(role.permissions)
        found = act.accounts.users.set_role(act.organization, user_id, role.id)
    return json_response(shown(act, found))


@router.delete(f"{USERS}/{{user_id}}", response_model=objects.Deleted)
@requires("users.write")
def delete_user(request: Request, user_id: Id) -> Response:
    """Their keys end."""
    act = Act.of(request)
    act.may_touch(user_id)
    act.accounts.users.remove(act.organization, user_id)
    return json_response(answers.deleted("organization.user", user_id))


@router.get(MEMBERS, response_model=objects.Cursor[objects.ProjectUser])
@requires("users.read")
def list_members(request: Request, project_id: Id, asked: Paged) -> Response:
    act = Act.of(request)
    found = act.accounts.users.members(act.organization, project_id, asked)
    names = act.accounts.roles.names(act.organization, project_id)
    return json_response(answers.cursor(found, lambda member: answers.project_user(member, names[member.role_id])))


@router.post(MEMBERS, response_model=objects.ProjectUser, openapi_extra=takes(forms.MemberCreate))
@requires("users.write")
def create_member(request: Request, project_id: Id) -> Response:
    """One of the organization, by id or address, into the project."""
    act = Act.of(request)
    asked = act.form(forms.MemberCreate)
    user = asked.user_id or _by_address(act, asked.email)
    made = act.accounts.users.join(act.organization, project_id, user, asked.role)
    return json_response(_member(act, made))


@router.get(f"{MEMBERS}/{{user_id}}", response_model=objects.ProjectUser)
@requires("users.read")
def retrieve_member(request: Request, project_id: Id, user_id: Id) -> Response:
    act = Act.of(request)
    return json_response(_member(act, act.accounts.users.member(act.organization, project_id, user_id)))


@router.post(f"{MEMBERS}/{{user_id}}", response_model=objects.ProjectUser, openapi_extra=takes(forms.MemberUpdate))
@requires("users.write")
def update_member(request: Request, project_id: Id, user_id: Id) -> Response:
    act = Act.of(request)
    role = act.form(forms.MemberUpdate).role
    found = act.accounts.users.member(act.organization, project_id, user_id)
    if role is not None:
        found = act.accounts.users.set_member_role(act.organization, project_id, user_id, role)
    return json_response(_member(act, found))


@router.delete(f"{MEMBERS}/{{user_id}}", response_model=objects.Deleted)
@requires("users.write")
def delete_member(request: Request, project_id: Id, user_id: Id) -> Response:
    act = Act.of(request)
    act.accounts.users.leave(act.organization, project_id, user_id)
    return json_response(answers.deleted("organization.project.user", user_id))


@router.get(INVITES, response_model=objects.Cursor[objects.Invite])
@requires("users.read")
def list_invites(request: Request, asked: Paged) -> Response:
    act = Act.of(request)
    found = act.accounts.invites.list(act.organization, asked)
    return json_response(answers.cursor(found, lambda invite: answers.invite(invite, act.accounts.clock())))


@router.post(INVITES, response_model=objects.NewInvite, openapi_extra=takes(forms.InviteCreate))
@requires("users.write")
def create_invite(request: Request) -> Response:
    """Nothing is mailed: `token` is shown this once, to be handed over and accepted with `mmaas users accept`."""
    act = Act.of(request)
    asked = act.form(forms.InviteCreate)
    role = act.accounts.roles.resolve(act.organization, None, asked.role)
    act.may_grant(role.permissions)
    within = {project.id: project.role for project in asked.projects or ()}
    made, token = act.accounts.invites.create(act.organization, asked.email, role.id, within)
    return json_response({**answers.invite(made, act.accounts.clock()), "token": token})


@router.get(f"{INVITES}/{{invite_id}}", response_model=objects.Invite)
@requires("users.read")
def retrieve_invite(request: Request, invite_id: Id) -> Response:
    act = Act.of(request)
    return json_response(answers.invite(act.accounts.invites.get(act.organization, invite_id), act.accounts.clock()))


@router.delete(f"{INVITES}/{{invite_id}}", response_model=objects.Deleted)
@requires("users.write")
def delete_invite(request: Request, invite_id: Id) -> Response:
    act = Act.of(request)
    act.accounts.invites.delete(act.organization, invite_id)
    return json_response(answers.deleted("organization.invite", invite_id))


def shown(act: Act, user: User) -> objects.User:
    return answers.user(user, act.accounts.roles.names(act.organization, None)[user.role_id])


def _member(act: Act, member: Member) -> objects.ProjectUser:
    return answers.project_user(member, act.accounts.roles.names(act.organization, member.project)[member.role_id])


def _project(act: Act, member: Member) -> objects.UserProject:
    name = act.accounts.projects.get(act.organization, member.project).name
    return {"id": member.project, "name": name, "role": act.accounts.roles.names(act.organization, member.project)[member.role_id]}


def _by_address(act: Act, email: str | None) -> str:
    if email is None:
        raise InvalidRequest("Say who: user_id or email.", param="user_id", code="missing_required_parameter")
    found = act.accounts.users.list(act.organization, emails=[email]).items if email.isprintable() else []
    if not found:
        raise NotFound("There is no such user.")
    return found[0].id
