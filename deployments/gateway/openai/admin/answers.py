"""How our things become objects of the administration API. Times go out in whole seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from cluster.tenancy.groups import Group as OurGroup
from cluster.tenancy.groups import ProjectGroup as OurProjectGroup
from cluster.tenancy.invites import Invite as OurInvite
from cluster.tenancy.key_records import Key
from cluster.tenancy.paging import Page
from cluster.tenancy.permissions import PREDEFINED, expand
from cluster.tenancy.projects import Organization
from cluster.tenancy.projects import Project as OurProject
from cluster.tenancy.roles import Role as OurRole
from cluster.tenancy.service_accounts import ServiceAccount as OurServiceAccount
from cluster.tenancy.users import Member
from cluster.tenancy.users import User as OurUser
from deployments.gateway.openai.admin.objects import (
    AdminKey,
    AdminOwner,
    AssignedRole,
    AssigneeGroup,
    Cursor,
    Deleted,
    Group,
    GroupMember,
    Invite,
    KeyAccount,
    KeyOwner,
    NewKey,
    Next,
    Project,
    ProjectGroup,
    ProjectKey,
    ProjectUser,
    Removed,
    Role,
    ServiceAccount,
    User,
)

Item = TypeVar("Item")


def cursor(page: Page[Item], shown: Callable[[Item], Any]) -> Cursor[Any]:
    data = [shown(item) for item in page.items]
    ends = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": ends[0], "last_id": ends[1], "has_more": page.has_more}


def following(page: Page[Item], shown: Callable[[Item], Any], key: str = "id") -> Next[Any]:
    data = [shown(item) for item in page.items]
    return {"object": "list", "data": data, "has_more": page.has_more, "next": data[-1][key] if page.has_more else None}


def deleted(kind: str, key: str) -> Deleted:
    return {"object": f"{kind}.deleted", "id": key, "deleted": True}


def removed(kind: str) -> Removed:
    return {"object": f"{kind}.deleted", "deleted": True}


def project(found: OurProject) -> Project:
    return {
        "id": found.id,
        "object": "organization.project",
        "name": found.name,
        "created_at": int(found.created_at),
        "archived_at": _time(found.archived_at),
        "status": "active" if found.archived_at is None else "archived",
    }


def service_account(found: OurServiceAccount) -> ServiceAccount:
    return {
        "id": found.id,
        "object": "organization.project.service_account",
        "name": found.name,
        "role": found.role,
        "created_at": int(found.created_at),
    }


def new_key(made: Key, text: str) -> NewKey:
    return {
        "id": made.id,
        "object": "organization.project.service_account.api_key",
        "value": text,
        "name": made.name,
        "created_at": int(made.created_at),
        "expires_at": _time(made.expires_at),
    }


def project_key(found: Key) -> ProjectKey:
    return {
        "id": found.id,
        "object": "organization.project.api_key",
        "name": found.name,
        "redacted_value": found.redacted,
        "created_at": int(found.created_at),
        "last_used_at": _time(found.last_used_at),
        "expires_at": _time(found.expires_at),
        "owner": _owner(found),
        "owner_project_access": "active" if found.has_owner else "inactive",
        "scopes": sorted(found.scopes),
        "models": None if found.models is None else sorted(found.models),
    }


def _owner(key: Key) -> KeyOwner:
    owner = key.owner
    assert owner is not None, "a project's key has one"
    if isinstance(owner, OurUser):
        about = {"id": owner.id, "email": owner.email, "name": owner.name, "created_at": int(owner.created_at)}
        return {"type": "user", "user": {**about, "role": role_name(owner.role_id)}}  # type: ignore[typeddict-item]
    account: KeyAccount = {"id": owner.id, "name": owner.name, "created_at": int(owner.created_at), "role": owner.role}
    return {"type": "service_account", "service_account": account}


def admin_key(found: Key, organization: Organization) -> AdminKey:
    """Without a user, a key is the organization's own."""
    user = found.owner
    owner: AdminOwner = {
        "type": "user" if user else "organization",
        "object": "organization.user" if user else "organization",
        "id": user.id if user else organization.id,
        "name": user.name if user else organization.name,
        "created_at": int(user.created_at if user else organization.created_at),
        "role": role_name(user.role_id) if isinstance(user, OurUser) else "owner",
    }
    return {
        "id": found.id,
        "object": "organization.admin_api_key",
        "name": found.name,
        "redacted_value": found.redacted,
        "created_at": int(found.created_at),
        "expires_at": _time(found.expires_at),
        "last_used_at": _time(found.last_used_at),
        "owner": owner,
        "scopes": sorted(found.scopes),
    }


def user(found: OurUser, role: str) -> User:
    return {
        "id": found.id,
        "object": "organization.user",
        "name": found.name,
        "email": found.email,
        "role": role,
        "added_at": int(found.created_at),
        "created": int(found.created_at),
        "is_service_account": False,
        "is_scim_managed": False,
        "user": {"object": "user", "id": found.id, "email": found.email, "name": found.name, "enabled": True},
    }


def project_user(found: Member, role: str) -> ProjectUser:
    return {
        "id": found.user.id,
        "object": "organization.project.user",
        "name": found.user.name,
        "email": found.user.email,
        "role": role,
        "added_at": int(found.created_at),
    }


def group(found: OurGroup) -> Group:
    own: Group = {
        "id": found.id,
        "name": found.name,
        "created_at": int(found.created_at),
        "is_scim_managed": False,
        "group_type": "group",
    }
    return own


def group_member(found: OurUser) -> GroupMember:
    return {
        "id": found.id,
        "name": found.name,
        "email": found.email,
        "picture": None,
        "is_service_account": False,
        "user_type": "user",
    }


def project_group(found: OurProjectGroup) -> ProjectGroup:
    return {
        "object": "project.group",
        "project_id": found.project,
        "group_id": found.group.id,
        "group_name": found.group.name,
        "group_type": "group",
        "created_at": int(found.created_at),
    }


def assignee_group(found: OurGroup) -> AssigneeGroup:
    return {"object": "group", "id": found.id, "name": found.name, "created_at": int(found.created_at), "scim_managed": False}


def role(found: OurRole) -> Role:
    return {
        "id": found.id,
        "object": "role",
        "name": found.name,
        "description": found.description,
        "permissions": sorted(expand(found.permissions)),
        "resource_type": f"api.{found.level}",
        "predefined_role": found.predefined,
    }


def assigned_role(found: OurRole, sources: Sequence[tuple[str, str]]) -> AssignedRole:
    return {
        "id": found.id,
        "name": found.name,
        "description": found.description,
        "permissions": sorted(expand(found.permissions)),
        "resource_type": f"api.{found.level}",
        "predefined_role": found.predefined,
        "created_at": _time(found.created_at),
        "updated_at": _time(found.updated_at),
        "created_by": None,
        "created_by_user_obj": None,
        "metadata": None,
        "assignment_sources": [{"principal_id": holder, "principal_type": kind} for kind, holder in sources],
    }


def invite(found: OurInvite, now: float) -> Invite:
    """The official words know two roles of each level; `role_id` says which it is."""
    pending: Literal["expired", "pending"] = "expired" if found.expires_at <= now else "pending"
    return {
        "id": found.id,
        "object": "organization.invite",
        "email": found.email,
        "role": "owner" if found.role_id == "role_organization_owner" else "reader",
        "role_id": found.role_id,
        "status": pending if found.accepted_at is None else "accepted",
        "created_at": int(found.created_at),
        "expires_at": int(found.expires_at),
        "accepted_at": _time(found.accepted_at),
        "projects": [
            {"id": project, "role": "owner" if role_id == "role_project_owner" else "member", "role_id": role_id}
            for project, role_id in found.projects.items()
        ],
    }


def role_name(role_id: str) -> str:
    """A predefined role's name; a custom role goes by its id where only one key is shown."""
    return PREDEFINED[role_id].name if role_id in PREDEFINED else role_id


def _time(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
