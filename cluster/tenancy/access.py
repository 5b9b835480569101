"""What a user may do: all that their roles and their groups' roles say together, read anew each time it is asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from cluster.tenancy import permissions, roles
from cluster.tenancy.groups import group_users, project_groups
from cluster.tenancy.users import project_users, users


def in_organization(connection: Connection, organization: str, user: str) -> frozenset[str]:
    """Permissions of the organization. Nobody's are none."""
    first: str | None = connection.scalar(_live(organization, user))
    if first is None:
        return frozenset()
    return _union(connection, organization, None, [first, *_assigned(connection, None, user)])


def in_project(connection: Connection, organization: str, project: str, user: str) -> frozenset[str] | None:
    """Permissions of a project; none at all for a user who isn't in it, neither by name nor through a group."""
    if connection.scalar(_live(organization, user)) is None:
        return None
    by_name = project_users.c.role_id, (project_users.c.project_id == project) & (project_users.c.user_id == user)
    mine = sa.select(group_users.c.group_id).where(group_users.c.user_id == user)
    by_group = project_groups.c.role_id, (project_groups.c.project_id == project) & project_groups.c.group_id.in_(mine)
    first = [role for column, where in (by_name, by_group) for role in connection.scalars(sa.select(column).where(where))]
    return _union(connection, organization, project, [*first, *_assigned(connection, project, user)]) if first else None


def _live(organization: str, user: str) -> sa.Select[Any]:
    return sa.select(users.c.role_id).where(
        users.c.id == user, users.c.organization_id == organization, users.c.deleted_at.is_(None)
    )


def _assigned(connection: Connection, project: str | None, user: str) -> Iterator[str]:
    yield from roles.assigned(connection, project, "user", user)
    for group in connection.scalars(sa.select(group_users.c.group_id).where(group_users.c.user_id == user)).all():
        yield from roles.assigned(connection, project, "group", group)


def _union(connection: Connection, organization: str, project: str | None, held: Iterable[str]) -> frozenset[str]:
    granted = [roles.find(connection, organization, project, role).permissions for role in set(held)]
    return permissions.expand(frozenset().union(*granted))
