"""Roles: the predefined ones, custom ones of an organization or a project, and who was given which.

Beside the one role that everybody has in an organization, project or group's project, any number can be assigned to a user or a
group. What they add up to is `access.py`'s to say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Column, Connection, Float, ForeignKey, Index, String, Table, Text

from cluster.errors import Conflict, InvalidRequest
from cluster.store import Store, metadata
from cluster.tenancy import acts, paging, permissions, projects
from cluster.tenancy.acts import Note, Rows, unnoted
from cluster.tenancy.paging import FIRST, Asked, Page
from cluster.tenancy.permissions import PREDEFINED, Level

Kind = Literal["user", "group"]
WHOLE = ""
"""In the place of a project's id: the whole organization."""

roles = Table(
    "roles",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("organization_id", String(63), ForeignKey("organizations.id", name="fk_roles_organization"), nullable=False),
    Column("project_id", String(63), ForeignKey("projects.id", name="fk_roles_project")),  # none: a role of the organization
    Column("name", String(100), nullable=False),
    Column("description", String(1000)),
    Column("permissions", Text, nullable=False),  # words separated by one space
    Column("created_at", Float(53), nullable=False),
    Column("updated_at", Float(53), nullable=False),
    Index("ix_roles_organization_id_created_at", "organization_id", "created_at"),
)

assignments = Table(
    "role_assignments",
    metadata,
    Column("project_id", String(63), primary_key=True),  # WHOLE: in the organization
    Column("kind", String(8), primary_key=True),  # user or group
    Column("holder_id", String(63), primary_key=True),
    Column("role_id", String(63), primary_key=True),
    Column("created_at", Float(53), nullable=False),
    Index("ix_role_assignments_holder_id", "holder_id"),
)


@dataclass(frozen=True, slots=True)
class Role:
    """Times are none for a predefined role."""

    id: str
    level: Level
    name: str
    description: str | None
    permissions: frozenset[str]
    predefined: bool
    created_at: float | None = None
    updated_at: float | None = None


class Roles:
    """The roles in the store. `project` None means the organization's own. Every verb raises NotFound for what isn't there."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time, note: Note = unnoted) -> None:
        self._store = store
        self._clock = clock
        self._note = note

    def create(
        self, organization: str, project: str | None, name: str, granted: Iterable[str], description: str | None = None
    ) -> Role:
        """Raises InvalidRequest, and Conflict for a name that is taken."""
        now, role_id = self._clock(), paging.new_id("role")
        values = {"name": _checked(name), "description": _described(description), "permissions": _words(project, granted)}
        with acts.begin(self._store, self._note, organization) as rows:
            _level(rows.connection, organization, project)
            _free(rows.connection, organization, project, name, but=None)
            own = {"id": role_id, "organization_id": organization, "project_id": project, "created_at": now, "updated_at": now}
            rows.insert("role.created", roles, {**values, **own})
            return find(rows.connection, organization, project, role_id)

    def get(self, organization: str, project: str | None, role: str) -> Role:
        with self._store.read() as connection:
            _level(connection, organization, project)
            return find(connection, organization, project, role)

    def list(self, organization: str, project: str | None, asked: Asked = FIRST) -> Page[Role]:
        """The predefined roles first, then the custom ones by time; `desc` turns that round."""
        with self._store.read() as connection:
            _level(connection, organization, project)
            rows = connection.execute(_custom(organization, project).order_by(roles.c.created_at, roles.c.id)).all()
        return cut([*predefined(project), *map(_role, rows)], asked)

    def names(self, organization: str, project: str | None) -> dict[str, str]:
        """Every role's name by its id."""
        with self._store.read() as connection:
            custom = {row.id: row.name for row in connection.execute(_custom(organization, project))}
        return {role.id: role.name for role in predefined(project)} | custom

    def resolve(self, organization: str, project: str | None, named: str) -> Role:
        """By id or by name. Raises InvalidRequest for what is neither."""
        with self._store.read() as connection:
            _level(connection, organization, project)
            return resolve(connection, organization, project, named)

    def update(
        self,
        organization: str,
        project: str | None,
        role: str,
        *,
        name: str | None = None,
        granted: Iterable[str] | None = None,
        description: str | None = None,
    ) -> Role:
        """Change what is given. Raises InvalidRequest, and Conflict for a predefined role or a name that is taken."""
        changes: dict[str, Any] = {"updated_at": self._clock()}
        if granted is not None:
            changes["permissions"] = _words(project, granted)
        if description is not None:
            changes["description"] = _described(description)
        with acts.begin(self._store, self._note, organization) as rows:
            _level(rows.connection, organization, project)
            _own(find(rows.connection, organization, project, role))
            if name is not None:
                changes["name"] = _checked(name)
                _free(rows.connection, organization, project, name, but=role)
            rows.update("role.updated", roles, roles.c.id == role, changes)
            return find(rows.connection, organization, project, role)

    def delete(self, organization: str, project: str | None, role: str) -> None:
        """Take it from all who were assigned it. Raises Conflict for a predefined role and for one that is somebody's only one."""
        from cluster.tenancy.groups import project_groups
        from cluster.tenancy.users import project_users, users

        with acts.begin(self._store, self._note, organization) as rows:
            _level(rows.connection, organization, project)
            _own(find(rows.connection, organization, project, role))
            for table in (users, project_users, project_groups):
                live = table.c.deleted_at.is_(None) if table is users else sa.true()
                if rows.connection.execute(sa.select(table).where(table.c.role_id == role, live)).first() is not None:
                    raise Conflict("The role is somebody's first one: give them another before.")
            rows.delete("role.assignment.deleted", assignments, assignments.c.role_id == role, "holder_id")
            rows.delete("role.deleted", roles, roles.c.id == role)

    def assign(self, organization: str, project: str | None, kind: Kind, holder: str, role: str) -> Role:
        """Give a role to a user or group; again changes nothing. The caller knows that the holder is the organization's."""
        with acts.begin(self._store, self._note, organization) as rows:
            _level(rows.connection, organization, project)
            found = find(rows.connection, organization, project, role)
            if found.id not in assigned(rows.connection, project, kind, holder):
                place = {"project_id": project or WHOLE, "kind": kind, "holder_id": holder, "role_id": found.id}
                rows.insert("role.assignment.created", assignments, {**place, "created_at": self._clock()}, "holder_id")
            return found

    def assigned(self, organization: str, project: str | None, kind: Kind, holder: str) -> Sequence[Role]:
        """The roles that were assigned, the earliest first."""
        with self._store.read() as connection:
            _level(connection, organization, project)
            return [find(connection, organization, project, role) for role in assigned(connection, project, kind, holder)]

    def find_assigned(self, organization: str, project: str | None, kind: Kind, holder: str, role: str) -> Role:
        """One of the roles that were assigned."""
        found = [one for one in self.assigned(organization, project, kind, holder) if one.id == role]
        return paging.only(found[0] if found else None, "assignment")

    def take(self, organization: str, project: str | None, kind: Kind, holder: str, role: str) -> None:
        found = self.find_assigned(organization, project, kind, holder, role)
        with acts.begin(self._store, self._note, organization) as rows:
            same = _given(project, kind, holder) & (assignments.c.role_id == found.id)
            rows.delete("role.assignment.deleted", assignments, same, "holder_id")


def predefined(project: str | None) -> list[Role]:
    level: Level = "organization" if project is None else "project"
    return [_ready(role.id) for role in PREDEFINED.values() if role.level == level]


def find(connection: Connection, organization: str, project: str | None, role: str) -> Role:
    """By id. Raises NotFound."""
    if role in PREDEFINED and (PREDEFINED[role].level == "project") == (project is not None):
        return _ready(role)
    row = connection.execute(_custom(organization, project).where(roles.c.id == role)).one_or_none()
    return _role(paging.only(row, "role"))


def resolve(connection: Connection, organization: str, project: str | None, named: str) -> Role:
    """By id or by name. Raises InvalidRequest for what is neither."""
    known = [*predefined(project), *map(_role, connection.execute(_custom(organization, project)))]
    for role in known:
        if named in (role.id, role.name):
            return role
    names = ", ".join(role.name for role in known)
    raise InvalidRequest(f"role is not one of {names}, nor the id of one.", param="role")


def assigned(connection: Connection, project: str | None, kind: Kind, holder: str) -> list[str]:
    """Ids of the roles that a user or group was given in addition."""
    query = sa.select(assignments.c.role_id).where(_given(project, kind, holder))
    return list(connection.scalars(query.order_by(assignments.c.created_at, assignments.c.role_id)))


def forget(rows: Rows, kind: Kind, holder: str, project: str | None = None) -> None:
    """Take every assigned role, in all places or in one project."""
    same = (assignments.c.kind == kind) & (assignments.c.holder_id == holder)
    if project is not None:
        same &= assignments.c.project_id == project
    rows.delete("role.assignment.deleted", assignments, same, "holder_id")


def cut(items: Sequence[Role], asked: Asked) -> Page[Role]:
    """A page of a short list that is whole in memory. Raises InvalidRequest for an `after` that isn't in it."""
    ordered = list(items) if asked.order == "asc" else list(reversed(items))
    if asked.after is not None:
        places = [place for place, role in enumerate(ordered) if role.id == asked.after]
        if not places:
            raise InvalidRequest("after is not the id of an item of this list.", param="after")
        ordered = ordered[places[0] + 1 :]
    return Page(ordered[: asked.limit], len(ordered) > asked.limit)


def _level(connection: Connection, organization: str, project: str | None) -> None:
    if project is not None:
        projects.find(connection, organization, project)


def _custom(organization: str, project: str | None) -> sa.Select[Any]:
    return sa.select(roles).where(roles.c.organization_id == organization, roles.c.project_id == project)


def _given(project: str | None, kind: Kind, holder: str) -> sa.ColumnElement[bool]:
    place = assignments.c.project_id == (project or WHOLE)
    return place & (assignments.c.kind == kind) & (assignments.c.holder_id == holder)


def _own(role: Role) -> None:
    if role.predefined:
        raise Conflict("A predefined role can't be changed.")


def _free(connection: Connection, organization: str, project: str | None, name: str, *, but: str | None) -> None:
    taken = {role.name for role in predefined(project)}
    taken |= {row.name for row in connection.execute(_custom(organization, project)) if row.id != but}
    if name in taken:
        raise Conflict("There is a role of this name already.")


def _checked(name: str) -> str:
    return paging.checked_name(name, "role_name")


def _described(text: str | None) -> str | None:
    return None if text is None else paging.checked_name(text, "description", 1000)


def _words(project: str | None, granted: Iterable[str]) -> str:
    level: Level = "organization" if project is None else "project"
    return " ".join(sorted(permissions.check(granted, permissions.words(level), "permissions")))


def _ready(role_id: str) -> Role:
    role = PREDEFINED[role_id]
    return Role(role.id, role.level, role.name, role.description, role.permissions, predefined=True)


def _role(row: Any) -> Role:
    level: Level = "organization" if row.project_id is None else "project"
    granted = frozenset(row.permissions.split())
    return Role(row.id, level, row.name, row.description, granted, False, row.created_at, row.updated_at)
