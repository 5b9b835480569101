"""Rows of keys: the table, what is known of a key's owner and project beside it, and what may be shown of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Column, Connection, Float, ForeignKey, Index, LargeBinary, String, Table, Text

from cluster.store import metadata
from cluster.tenancy import projects, service_accounts, users
from cluster.tenancy.service_accounts import ServiceAccount
from cluster.tenancy.users import User

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(12), primary_key=True),
    Column("organization_id", String(63), ForeignKey("organizations.id", name="fk_api_keys_organization"), nullable=False),
    Column("project_id", String(63), ForeignKey("projects.id", name="fk_api_keys_project")),  # none: an admin key
    Column("service_account_id", String(63), ForeignKey("service_accounts.id", name="fk_api_keys_service_account")),
    Column("user_id", String(63), ForeignKey("users.id", name="fk_api_keys_user")),
    Column("name", String(100), nullable=False),
    Column("digest", LargeBinary(32), nullable=False),  # HMAC-SHA256(pepper, secret); the secret itself is stored nowhere
    Column("scopes", Text, nullable=False),  # words separated by one space, as `models` are
    Column("models", Text),  # none: every model
    Column("created_at", Float(53), nullable=False),  # seconds since the epoch, here and below
    Column("expires_at", Float(53)),
    Column("revoked_at", Float(53)),
    Column("last_used_at", Float(53)),
    Column("replaced_by", String(12)),  # the key that it was rotated to
    Index("ix_api_keys_organization_id_created_at", "organization_id", "created_at"),
    Index("ix_api_keys_project_id_created_at", "project_id", "created_at"),
)


@dataclass(frozen=True, slots=True)
class Key:
    """What may be shown of a key. Without a project it is an admin key. Times are seconds since the epoch. `has_owner`: its owner
    and its project are still there; `is_open`: that, and it is neither revoked nor expired."""

    id: str
    organization: str
    project: str | None
    name: str
    scopes: frozenset[str]
    models: frozenset[str] | None
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None
    replaced_by: str | None
    owner: ServiceAccount | User | None
    has_owner: bool
    is_open: bool

    @property
    def redacted(self) -> str:
        """What tells this key from others in a list: its public id."""
        return f"mk_{self.id}{'*' * 8}"


def owned() -> sa.Select[Any]:
    """Keys with what is known of their owner and project."""
    account, user = service_accounts.service_accounts, users.users
    columns = (
        *(account.c[name].label(f"account_{name}") for name in ("name", "role", "created_at", "deleted_at")),
        *(user.c[name].label(f"user_{name}") for name in ("name", "email", "role_id", "created_at", "deleted_at")),
        projects.projects.c.archived_at,
    )
    joined = api_keys.outerjoin(account, account.c.id == api_keys.c.service_account_id)
    joined = joined.outerjoin(user, user.c.id == api_keys.c.user_id)
    joined = joined.outerjoin(projects.projects, projects.projects.c.id == api_keys.c.project_id)
    return sa.select(api_keys, *columns).select_from(joined)


def of_place(organization: str, project: str | None) -> sa.Select[Any]:
    query = owned().where(api_keys.c.organization_id == organization, api_keys.c.revoked_at.is_(None))
    return query.where(api_keys.c.project_id == project)


def _owner(row: Any) -> ServiceAccount | User | None:
    if row.service_account_id is not None:
        return ServiceAccount(row.service_account_id, row.project_id, row.account_name, row.account_role, row.account_created_at)
    if row.user_id is not None:
        return User(row.user_id, row.organization_id, row.user_email, row.user_name, row.user_role_id, row.user_created_at)
    return None


def email_of(connection: Connection, key_id: str) -> str | None:
    """The address of the user whose key it is."""
    query = sa.select(users.users.c.email).join(api_keys, api_keys.c.user_id == users.users.c.id)
    found: str | None = connection.scalar(query.where(api_keys.c.id == key_id))
    return found


def owner_gone(row: Any) -> bool:
    return any(end is not None for end in (row.account_deleted_at, row.user_deleted_at, row.archived_at))


def key_of(row: Any, now: float) -> Key:
    has_ended = row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= now)
    has_owner = not owner_gone(row)
    return Key(
        row.id,
        row.organization_id,
        row.project_id,
        row.name,
        frozenset(row.scopes.split()),
        split(row.models),
        row.created_at,
        row.expires_at,
        row.revoked_at,
        row.last_used_at,
        row.replaced_by,
        _owner(row),
        has_owner,
        has_owner and not has_ended,
    )


def split(words: str | None) -> frozenset[str] | None:
    return None if words is None else frozenset(words.split())
