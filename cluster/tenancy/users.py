"""People: who belongs to an organization and to which of its projects, with which role.

People don't log in here. They act through keys that are theirs, and what such a key may do follows their roles (`access.py`). They
come in by an invitation (`invites.py`). One who is removed stays as a row, for what was done in their name.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Column, Connection, Float, ForeignKey, Index, String, Table

from cluster.errors import InvalidRequest
from cluster.store import Store, metadata
from cluster.tenancy import acts, paging, projects, roles
from cluster.tenancy.acts import Note, Rows, unnoted
from cluster.tenancy.paging import FIRST, Asked, Page

_EMAIL = re.compile(r"[^\s@\x00-\x1f\x7f]{1,64}@[^\s@\x00-\x1f\x7f]{1,180}\Z")

users = Table(
    "users",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("organization_id", String(63), ForeignKey("organizations.id", name="fk_users_organization"), nullable=False),
    Column("email", String(250), nullable=False),  # in lower case
    Column("name", String(100), nullable=False),
    Column("role_id", String(63), nullable=False),  # predefined, or a row of `roles`
    Column("created_at", Float(53), nullable=False),
    Column("deleted_at", Float(53)),
    Index("ix_users_organization_id_created_at", "organization_id", "created_at"),
)
Index(
    "uq_users_organization_id_email",
    users.c.organization_id,
    users.c.email,
    unique=True,
    sqlite_where=users.c.deleted_at.is_(None),
    postgresql_where=users.c.deleted_at.is_(None),
)

project_users = Table(
    "project_users",
    metadata,
    Column("project_id", String(63), ForeignKey("projects.id", name="fk_project_users_project"), primary_key=True),
    Column("user_id", String(63), ForeignKey("users.id", name="fk_project_users_user"), primary_key=True),
    Column("role_id", String(63), nullable=False),
    Column("created_at", Float(53), nullable=False),
)


@dataclass(frozen=True, slots=True)
class User:
    """`created_at`: since when they belong to the organization."""

    id: str
    organization: str
    email: str
    name: str
    role_id: str
    created_at: float


@dataclass(frozen=True, slots=True)
class Member:
    """A user in a project; `created_at`: since when."""

    user: User
    project: str
    role_id: str
    created_at: float


class Users:
    """The users in the store. Every verb raises NotFound for what isn't there or is another organization's."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time, note: Note = unnoted) -> None:
        self._store = store
        self._clock = clock
        self._note = note

    def get(self, organization: str, user: str) -> User:
        with self._store.read() as connection:
            return find(connection, organization, user)

    def list(self, organization: str, asked: Asked = FIRST, emails: Sequence[str] = ()) -> Page[User]:
        query = _live(organization)
        if emails:
            query = query.where(users.c.email.in_([email.lower() for email in emails]))
        with self._store.read() as connection:
            return paging.read(connection, query, (users.c.created_at, users.c.id), asked, of_row)

    def add(self, organization: str, email: str, name: str, role: str) -> User:
        """Raises InvalidRequest, and Conflict when the address belongs to the organization already."""
        with acts.begin(self._store, self._note, organization) as rows:
            return insert(rows, organization, email, name, role, self._clock())

    def set_role(self, organization: str, user: str, role: str) -> User:
        """`role` is an id or a name. Raises InvalidRequest."""
        with acts.begin(self._store, self._note, organization) as rows:
            find(rows.connection, organization, user)
            found = roles.resolve(rows.connection, organization, None, role)
            rows.update("user.updated", users, users.c.id == user, {"role_id": found.id})
            return find(rows.connection, organization, user)

    def remove(self, organization: str, user: str) -> None:
        """They leave every project and group, and their keys end."""
        from cluster.tenancy.groups import group_users

        with acts.begin(self._store, self._note, organization) as rows:
            find(rows.connection, organization, user)
            rows.delete("user.deleted", project_users, project_users.c.user_id == user, "user_id")
            rows.delete("group.user.removed", group_users, group_users.c.user_id == user, "group_id")
            roles.forget(rows, "user", user)
            rows.update("user.deleted", users, users.c.id == user, {"deleted_at": self._clock()})

    def member(self, organization: str, project: str, user: str) -> Member:
        with self._store.read() as connection:
            projects.find(connection, organization, project)
            return find_member(connection, organization, project, user)

    def members(self, organization: str, project: str, asked: Asked = FIRST) -> Page[Member]:
        with self._store.read() as connection:
            projects.find(connection, organization, project)
            by = project_users.c.created_at, project_users.c.user_id
            return paging.read(connection, _members(organization, project), by, asked, _member)

    def memberships(self, organization: str, user: str) -> Sequence[Member]:
        """The projects that a user is in by name, not through a group."""
        query = _memberships(organization).where(users.c.id == user).order_by(project_users.c.created_at)
        with self._store.read() as connection:
            return [_member(row) for row in connection.execute(query)]

    def join(self, organization: str, project: str, user: str, role: str) -> Member:
        """Into a project, with a role of projects. Raises InvalidRequest, and Conflict for who is in or an archived project."""
        with acts.begin(self._store, self._note, organization) as rows:
            projects.find_live(rows.connection, organization, project)
            find(rows.connection, organization, user)
            found = roles.resolve(rows.connection, organization, project, role)
            with paging.unique("The user is in the project already."):
                enter(rows, project, user, found.id, self._clock())
            return find_member(rows.connection, organization, project, user)

    def set_member_role(self, organization: str, project: str, user: str, role: str) -> Member:
        """Raises InvalidRequest."""
        with acts.begin(self._store, self._note, organization) as rows:
            projects.find(rows.connection, organization, project)
            find_member(rows.connection, organization, project, user)
            found = roles.resolve(rows.connection, organization, project, role)
            rows.update("user.updated", project_users, _is(project, user), {"role_id": found.id}, "user_id")
            return find_member(rows.connection, organization, project, user)

    def leave(self, organization: str, project: str, user: str) -> None:
        with acts.begin(self._store, self._note, organization) as rows:
            projects.find(rows.connection, organization, project)
            find_member(rows.connection, organization, project, user)
            rows.delete("user.deleted", project_users, _is(project, user), "user_id")
            roles.forget(rows, "user", user, project)


def insert(rows: Rows, organization: str, email: str, name: str, role: str, now: float) -> User:
    """Raises InvalidRequest, and Conflict when the address belongs to the organization already."""
    address = checked_email(email)
    role_id = roles.resolve(rows.connection, organization, None, role).id
    made = User(paging.new_id("user"), organization, address, paging.checked_name(name), role_id, now)
    values = {"id": made.id, "organization_id": organization, "email": address, "name": name, "role_id": role_id, "created_at": now}
    with paging.unique("A user with this address belongs to the organization already."):
        rows.insert("user.added", users, values)
    return made


def enter(rows: Rows, project: str, user: str, role_id: str, now: float) -> None:
    """Into a project. Raises IntegrityError for who is in."""
    values = {"project_id": project, "user_id": user, "role_id": role_id, "created_at": now}
    rows.insert("user.added", project_users, values, "user_id")


def checked_email(email: str) -> str:
    """In lower case. Raises InvalidRequest."""
    if _EMAIL.match(email) is None or not email.isprintable():
        raise InvalidRequest("email is not an address.", param="email")
    return email.lower()


def find(connection: Connection, organization: str, user: str) -> User:
    """Raises NotFound."""
    return of_row(paging.only(connection.execute(_live(organization).where(users.c.id == user)).one_or_none(), "user"))


def find_member(connection: Connection, organization: str, project: str, user: str) -> Member:
    """Raises NotFound."""
    query = _members(organization, project).where(users.c.id == user)
    return _member(paging.only(connection.execute(query).one_or_none(), "user"))


def _live(organization: str) -> sa.Select[Any]:
    return sa.select(users).where(users.c.organization_id == organization, users.c.deleted_at.is_(None))


def _memberships(organization: str) -> sa.Select[Any]:
    inside = (project_users.c.project_id, project_users.c.role_id.label("member_role"), project_users.c.created_at.label("since"))
    joined = sa.select(users, *inside).join(project_users, project_users.c.user_id == users.c.id)
    return joined.where(users.c.organization_id == organization, users.c.deleted_at.is_(None))


def _members(organization: str, project: str) -> sa.Select[Any]:
    return _memberships(organization).where(project_users.c.project_id == project)


def _is(project: str, user: str) -> sa.ColumnElement[bool]:
    return (project_users.c.project_id == project) & (project_users.c.user_id == user)


def of_row(row: Any) -> User:
    return User(row.id, row.organization_id, row.email, row.name, row.role_id, row.created_at)


def _member(row: Any) -> Member:
    return Member(of_row(row), row.project_id, row.member_role, row.since)
