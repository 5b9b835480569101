"""Groups of users: given a project or a role, all of them have it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Column, Connection, Float, ForeignKey, Index, String, Table

from cluster.store import Store, metadata
from cluster.tenancy import acts, paging, projects, roles, users
from cluster.tenancy.acts import Note, unnoted
from cluster.tenancy.paging import FIRST, Asked, Page
from cluster.tenancy.users import User

groups = Table(
    "groups",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("organization_id", String(63), ForeignKey("organizations.id", name="fk_groups_organization"), nullable=False),
    Column("name", String(255), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Index("ix_groups_organization_id_created_at", "organization_id", "created_at"),
)

group_users = Table(
    "group_users",
    metadata,
    Column("group_id", String(63), ForeignKey("groups.id", name="fk_group_users_group"), primary_key=True),
    Column("user_id", String(63), ForeignKey("users.id", name="fk_group_users_user"), primary_key=True),
    Column("created_at", Float(53), nullable=False),
    Index("ix_group_users_user_id", "user_id"),
)

project_groups = Table(
    "project_groups",
    metadata,
    Column("project_id", String(63), ForeignKey("projects.id", name="fk_project_groups_project"), primary_key=True),
    Column("group_id", String(63), ForeignKey("groups.id", name="fk_project_groups_group"), primary_key=True),
    Column("role_id", String(63), nullable=False),
    Column("created_at", Float(53), nullable=False),
)


@dataclass(frozen=True, slots=True)
class Group:
    id: str
    organization: str
    name: str
    created_at: float


@dataclass(frozen=True, slots=True)
class ProjectGroup:
    """A group in a project; `created_at`: since when."""

    group: Group
    project: str
    role_id: str
    created_at: float


class Groups:
    """The groups in the store. Every verb raises NotFound for what isn't there or is another organization's."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time, note: Note = unnoted) -> None:
        self._store = store
        self._clock = clock
        self._note = note

    def create(self, organization: str, name: str) -> Group:
        """Raises InvalidRequest."""
        made = Group(paging.new_id("group"), organization, paging.checked_name(name, most=255), self._clock())
        values = {"id": made.id, "organization_id": organization, "name": name, "created_at": made.created_at}
        with acts.begin(self._store, self._note, organization) as rows:
            rows.insert("group.created", groups, values)
        return made

    def get(self, organization: str, group: str) -> Group:
        with self._store.read() as connection:
            return find(connection, organization, group)

    def list(self, organization: str, asked: Asked = FIRST) -> Page[Group]:
        query = sa.select(groups).where(groups.c.organization_id == organization)
        with self._store.read() as connection:
            return paging.read(connection, query, (groups.c.created_at, groups.c.id), asked, _group)

    def rename(self, organization: str, group: str, name: str) -> Group:
        """Raises InvalidRequest."""
        paging.checked_name(name, most=255)
        with acts.begin(self._store, self._note, organization) as rows:
            find(rows.connection, organization, group)
            rows.update("group.updated", groups, groups.c.id == group, {"name": name})
            return find(rows.connection, organization, group)

    def delete(self, organization: str, group: str) -> None:
        """Its users lose what they had through it."""
        with acts.begin(self._store, self._note, organization) as rows:
            find(rows.connection, organization, group)
            rows.delete("group.user.removed", group_users, group_users.c.group_id == group, "group_id")
            rows.delete("project.group.removed", project_groups, project_groups.c.group_id == group, "group_id")
            roles.forget(rows, "group", group)
            rows.delete("group.deleted", groups, groups.c.id == group)

    def add(self, organization: str, group: str, user: str) -> User:
        """Raises Conflict for one who is in."""
        with acts.begin(self._store, self._note, organization) as rows:
            find(rows.connection, organization, group)
            added = users.find(rows.connection, organization, user)
            values = {"group_id": group, "user_id": user, "created_at": self._clock()}
            with paging.unique("The user is in the group already."):
                rows.insert("group.user.added", group_users, values, "group_id")
            return added

    def user(self, organization: str, group: str, user: str) -> User:
        with self._store.read() as connection:
            find(connection, organization, group)
            row = connection.execute(_inside(group).where(users.users.c.id == user)).one_or_none()
            return users.of_row(paging.only(row, "user"))

    def users(self, organization: str, group: str, asked: Asked = FIRST) -> Page[User]:
        with self._store.read() as connection:
            find(connection, organization, group)
            by = group_users.c.created_at, group_users.c.user_id
            return paging.read(connection, _inside(group), by, asked, users.of_row)

    def remove(self, organization: str, group: str, user: str) -> None:
        with acts.begin(self._store, self._note, organization) as rows:
            find(rows.connection, organization, group)
            row = rows.connection.execute(_inside(group).where(users.users.c.id == user)).one_or_none()
            paging.only(row, "user")
            same = (group_users.c.group_id == group) & (group_users.c.user_id == user)
            rows.delete("group.user.removed", group_users, same, "group_id")

    def join(self, organization: str, project: str, group: str, role: str) -> ProjectGroup:
        """Into a project, with a role of projects. Raises InvalidRequest, and Conflict for one inside or an archived project."""
        with acts.begin(self._store, self._note, organization) as rows:
            projects.find_live(rows.connection, organization, project)
            find(rows.connection, organization, group)
            found = roles.resolve(rows.connection, organization, project, role)
            values = {"project_id": project, "group_id": group, "role_id": found.id, "created_at": self._clock()}
            with paging.unique("The group is in the project already."):
                rows.insert("project.group.added", project_groups, values, "group_id")
            return find_in_project(rows.connection, project, group)

    def in_project(self, organization: str, project: str, group: str) -> ProjectGroup:
        with self._store.read() as connection:
            projects.find(connection, organization, project)
            return find_in_project(connection, project, group)

    def of_project(self, organization: str, project: str, asked: Asked = FIRST) -> Page[ProjectGroup]:
        with self._store.read() as connection:
            projects.find(connection, organization, project)
            by = project_groups.c.created_at, project_groups.c.group_id
            return paging.read(connection, _in_project(project), by, asked, _project_group)

    def leave(self, organization: str, project: str, group: str) -> None:
        with acts.begin(self._store, self._note, organization) as rows:
            projects.find(rows.connection, organization, project)
            find_in_project(rows.connection, project, group)
            same = (project_groups.c.project_id == project) & (project_groups.c.group_id == group)
            rows.delete("project.group.removed", project_groups, same, "group_id")
            roles.forget(rows, "group", group, project)


def find(connection: Connection, organization: str, group: str) -> Group:
    """Raises NotFound."""
    query = sa.select(groups).where(groups.c.organization_id == organization, groups.c.id == group)
    return _group(paging.only(connection.execute(query).one_or_none(), "group"))


def find_in_project(connection: Connection, project: str, group: str) -> ProjectGroup:
    """Raises NotFound."""
    row = connection.execute(_in_project(project).where(groups.c.id == group)).one_or_none()
    return _project_group(paging.only(row, "group"))


def _inside(group: str) -> sa.Select[Any]:
    joined = sa.select(users.users).join(group_users, group_users.c.user_id == users.users.c.id)
    return joined.where(group_users.c.group_id == group, users.users.c.deleted_at.is_(None))


def _in_project(project: str) -> sa.Select[Any]:
    there = (project_groups.c.project_id, project_groups.c.role_id, project_groups.c.created_at.label("since"))
    return sa.select(groups, *there).join(project_groups).where(project_groups.c.project_id == project)


def _group(row: Any) -> Group:
    return Group(row.id, row.organization_id, row.name, row.created_at)


def _project_group(row: Any) -> ProjectGroup:
    return ProjectGroup(_group(row), row.project_id, row.role_id, row.since)
