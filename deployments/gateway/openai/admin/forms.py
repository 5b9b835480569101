"""Bodies of administrative requests. Fields that only the official platform honours are not listed, and so ignored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from deployments.gateway.openai.bounded import Bounded

YEAR_S = 31_536_000
Name = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Reference = Annotated[str, StringConstraints(min_length=1, max_length=100)]
"""An id, or a role's name."""
Life = Annotated[int, Field(ge=1, le=YEAR_S)]
Scopes = Annotated[list[Annotated[str, StringConstraints(max_length=64)]], Field(min_length=1, max_length=64)]
Models = Annotated[list[Annotated[str, StringConstraints(max_length=128)]], Field(min_length=1, max_length=100)]


class ProjectCreate(Bounded):
    name: Name


class ProjectUpdate(Bounded):
    name: Name | None = None


class ServiceAccountCreate(Bounded):
    name: Name
    create_service_account_only: bool | None = None
    expires_in_seconds: Life | None = None
    scopes: Scopes | None = None
    models: Models | None = None


class ServiceAccountUpdate(Bounded):
    name: Name | None = None
    role: Literal["member", "owner"] | None = None


class KeyCreate(Bounded):
    name: Name = "key"
    expires_in_seconds: Life | None = None
    scopes: Scopes | None = None
    models: Models | None = None


class KeyUpdate(Bounded):
    expires_in_seconds: Life | None = None
    scopes: Scopes | None = None
    models: Models | None = None


class AdminKeyCreate(Bounded):
    name: Name
    expires_in_seconds: Life | None = None
    scopes: Scopes | None = None
    user_id: Reference | None = None


class Rotation(Bounded):
    overlap_seconds: Annotated[int, Field(ge=0, le=YEAR_S)] | None = None


class UserUpdate(Bounded):
    role: Reference | None = None
    role_id: Reference | None = None


class MemberCreate(Bounded):
    role: Reference
    user_id: Reference | None = None
    email: Annotated[str, StringConstraints(max_length=250)] | None = None


class MemberUpdate(Bounded):
    role: Reference | None = None


class GroupName(Bounded):
    name: Annotated[str, StringConstraints(min_length=1, max_length=255)]


class GroupUser(Bounded):
    user_id: Reference


class GroupJoin(Bounded):
    group_id: Reference
    role: Reference


class RoleCreate(Bounded):
    role_name: Name
    permissions: Scopes
    description: Annotated[str, StringConstraints(min_length=1, max_length=1000)] | None = None


class RoleUpdate(Bounded):
    role_name: Name | None = None
    permissions: Scopes | None = None
    description: Annotated[str, StringConstraints(min_length=1, max_length=1000)] | None = None


class Assignment(Bounded):
    role_id: Reference


class InviteProject(Bounded):
    id: Reference
    role: Reference


class InviteCreate(Bounded):
    email: Annotated[str, StringConstraints(max_length=250)]
    role: Reference
    projects: Annotated[list[InviteProject], Field(max_length=100)] | None = None
