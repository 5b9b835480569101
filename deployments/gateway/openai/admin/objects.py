"""Objects of the administration API as typed dictionaries: what mypy checks, the OpenAPI document shows and goes out as JSON."""

from __future__ import annotations

from typing import Generic, Literal, NotRequired, TypeVar

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

T = TypeVar("T")


class Cursor(TypedDict, Generic[T]):
    """A page whose successor is asked for by the id of its last item."""

    object: Literal["list"]
    data: list[T]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Next(TypedDict, Generic[T]):
    """A page that says itself what its successor comes after."""

    object: Literal["list"]
    data: list[T]
    has_more: bool
    next: str | None


class Deleted(TypedDict):
    object: str
    id: str
    deleted: bool


class Removed(TypedDict):
    object: str
    deleted: bool


class Project(TypedDict):
    id: str
    object: Literal["organization.project"]
    name: str
    created_at: int
    archived_at: int | None
    status: Literal["active", "archived"]


class ServiceAccount(TypedDict):
    id: str
    object: Literal["organization.project.service_account"]
    name: str
    role: Literal["owner", "member"]
    created_at: int


class NewKey(TypedDict):
    id: str
    object: Literal["organization.project.service_account.api_key"]
    value: str
    name: str
    created_at: int
    expires_at: int | None


class NewServiceAccount(ServiceAccount):
    api_key: NewKey | None


class KeyAccount(TypedDict):
    id: str
    name: str
    created_at: int
    role: str


class KeyUser(TypedDict):
    id: str
    email: str
    name: str
    created_at: int
    role: str


class KeyOwner(TypedDict):
    type: Literal["user", "service_account"]
    service_account: NotRequired[KeyAccount]
    user: NotRequired[KeyUser]


class ProjectKey(TypedDict):
    id: str
    object: Literal["organization.project.api_key"]
    name: str
    redacted_value: str
    created_at: int
    last_used_at: int | None
    expires_at: int | None
    owner: KeyOwner
    owner_project_access: Literal["active", "inactive"]
    scopes: list[str]
    models: list[str] | None


class AdminOwner(TypedDict):
    type: str
    object: str
    id: str
    name: str
    created_at: int
    role: str


class AdminKey(TypedDict):
    id: str
    object: Literal["organization.admin_api_key"]
    name: str
    redacted_value: str
    created_at: int
    expires_at: int | None
    last_used_at: int | None
    owner: AdminOwner
    scopes: list[str]


class NewAdminKey(AdminKey):
    value: str


class Person(TypedDict):
    object: Literal["user"]
    id: str
    email: str
    name: str
    enabled: bool


class UserProject(TypedDict):
    id: str
    name: str
    role: str


class UserProjects(TypedDict):
    object: Literal["list"]
    data: list[UserProject]


class User(TypedDict):
    id: str
    object: Literal["organization.user"]
    name: str
    email: str
    role: str
    added_at: int
    created: int
    is_service_account: bool
    is_scim_managed: bool
    user: Person
    projects: NotRequired[UserProjects]


class ProjectUser(TypedDict):
    id: str
    object: Literal["organization.project.user"]
    name: str
    email: str
    role: str
    added_at: int


class Group(TypedDict):
    id: str
    name: str
    created_at: int
    is_scim_managed: bool
    group_type: Literal["group"]


class GroupMember(TypedDict):
    id: str
    name: str
    email: str
    picture: None
    is_service_account: bool
    user_type: Literal["user"]


class GroupUser(TypedDict):
    object: Literal["group.user"]
    user_id: str
    group_id: str


class ProjectGroup(TypedDict):
    object: Literal["project.group"]
    project_id: str
    group_id: str
    group_name: str
    group_type: Literal["group"]
    created_at: int


class Role(TypedDict):
    id: str
    object: Literal["role"]
    name: str
    description: str | None
    permissions: list[str]
    resource_type: str
    predefined_role: bool


class Source(TypedDict):
    principal_id: str
    principal_type: str


class AssignedRole(TypedDict):
    id: str
    name: str
    description: str | None
    permissions: list[str]
    resource_type: str
    predefined_role: bool
    created_at: int | None
    updated_at: int | None
    created_by: None
    created_by_user_obj: None
    metadata: None
    assignment_sources: list[Source]


class AssigneeGroup(TypedDict):
    object: Literal["group"]
    id: str
    name: str
    created_at: int
    scim_managed: bool


class UserRole(TypedDict):
    object: Literal["user.role"]
    user: User
    role: Role


class GroupRole(TypedDict):
    object: Literal["group.role"]
    group: AssigneeGroup
    role: Role


class InviteProject(TypedDict):
    id: str
    role: Literal["member", "owner"]
    role_id: str


class Invite(TypedDict):
    id: str
    object: Literal["organization.invite"]
    email: str
    role: Literal["owner", "reader"]
    role_id: str
    status: Literal["accepted", "expired", "pending"]
    created_at: int
    expires_at: int
    accepted_at: int | None
    projects: list[InviteProject]


class NewInvite(Invite):
    token: str
