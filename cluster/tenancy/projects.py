"""Organizations and their projects. A project is what everything below isolates by: its id is `Principal.tenant`.

An archived project stays to be looked at; its keys end with it (`keys.py` asks).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Column, Connection, Float, ForeignKey, Index, String, Table

from cluster.errors import Conflict
from cluster.store import Store, metadata
from cluster.tenancy import acts, paging
from cluster.tenancy.acts import Note, unnoted
from cluster.tenancy.paging import FIRST, Asked, Page

DEFAULT = "default"
"""Id of the organization, and of its project, that every platform has."""

organizations = Table(
    "organizations",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("name", String(100), nullable=False),
    Column("created_at", Float(53), nullable=False),  # seconds since the epoch, here and below
)

projects = Table(
    "projects",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("organization_id", String(63), ForeignKey("organizations.id", name="fk_projects_organization"), nullable=False),
    Column("name", String(100), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("archived_at", Float(53)),
    Index("ix_projects_organization_id_created_at", "organization_id", "created_at"),
)


@dataclass(frozen=True, slots=True)
class Organization:
    id: str
    name: str
    created_at: float


@dataclass(frozen=True, slots=True)
class Project:
    id: str
    organization: str
    name: str
    created_at: float
    archived_at: float | None


class Projects:
    """The organizations and projects in the store."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time, note: Note = unnoted) -> None:
        self._store = store
        self._clock = clock
        self._note = note

    def found(self, name: str) -> Organization:
        """Make an organization. Raises InvalidRequest for its name."""
        made = Organization(paging.new_id("org"), paging.checked_name(name), self._clock())
        with acts.begin(self._store, self._note, made.id) as rows:
            rows.insert("organization.created", organizations, asdict(made))
        return made

    def organizations(self) -> list[Organization]:
        with self._store.read() as connection:
            rows = connection.execute(sa.select(organizations).order_by(organizations.c.created_at, organizations.c.id)).all()
        return [Organization(row.id, row.name, row.created_at) for row in rows]

    def organization(self, organization: str) -> Organization:
        """Raises NotFound."""
        with self._store.read() as connection:
            query = sa.select(organizations).where(organizations.c.id == organization)
            row = paging.only(connection.execute(query).one_or_none(), "organization")
        return Organization(row.id, row.name, row.created_at)

    def owner(self, project: str) -> str:
        """The organization of a project, for the command line, which asks for none. Raises NotFound."""
        with self._store.read() as connection:
            return paging.only(organization_of(connection, project) or None, "project")

    def create(self, organization: str, name: str) -> Project:
        """Raises InvalidRequest for its name, NotFound for the organization."""
        self.organization(organization)
        made = Project(paging.new_id("proj"), organization, paging.checked_name(name), self._clock(), None)
        values = {"id": made.id, "organization_id": organization, "name": name, "created_at": made.created_at}
        with acts.begin(self._store, self._note, organization, made.id) as rows:
            rows.insert("project.created", projects, values)
        return made

    def get(self, organization: str, project: str) -> Project:
        """Raises NotFound, also for another organization's."""
        with self._store.read() as connection:
            return find(connection, organization, project)

    def list(self, organization: str, asked: Asked = FIRST, *, include_archived: bool = False) -> Page[Project]:
        query = sa.select(projects).where(projects.c.organization_id == organization)
        if not include_archived:
            query = query.where(projects.c.archived_at.is_(None))
        with self._store.read() as connection:
            return paging.read(connection, query, (projects.c.created_at, projects.c.id), asked, _project)

    def rename(self, organization: str, project: str, name: str) -> Project:
        """Raises NotFound, InvalidRequest, and Conflict for an archived one."""
        values = {"name": paging.checked_name(name)}
        with acts.begin(self._store, self._note, organization, project) as rows:
            find_live(rows.connection, organization, project)
            rows.update("project.updated", projects, projects.c.id == project, values)
            return find(rows.connection, organization, project)

    def archive(self, organization: str, project: str) -> Project:
        """End a project and with it its keys; doing it again changes nothing. Raises NotFound."""
        with acts.begin(self._store, self._note, organization, project) as rows:
            find(rows.connection, organization, project)
            same = (projects.c.id == project) & projects.c.archived_at.is_(None)
            rows.update("project.archived", projects, same, {"archived_at": self._clock()})
            return find(rows.connection, organization, project)


def find(connection: Connection, organization: str, project: str) -> Project:
    """Raises NotFound, also for another organization's."""
    query = sa.select(projects).where(projects.c.organization_id == organization, projects.c.id == project)
    return _project(paging.only(connection.execute(query).one_or_none(), "project"))


def find_live(connection: Connection, organization: str, project: str) -> Project:
    """Raises NotFound, and Conflict for one that is archived."""
    found = find(connection, organization, project)
    if found.archived_at is not None:
        raise Conflict("The project is archived.")
    return found


def organization_of(connection: Connection, project: str) -> str:
    """The organization of a project; none for one that isn't there."""
    found: str | None = connection.scalar(sa.select(projects.c.organization_id).where(projects.c.id == project))
    return found or ""


def _project(row: Any) -> Project:
    return Project(row.id, row.organization_id, row.name, row.created_at, row.archived_at)
