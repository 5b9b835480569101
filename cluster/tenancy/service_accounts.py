"""Service accounts: who a project's programs are. A deleted one stays as a row, for what was done in its name; its keys end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Column, Connection, Float, ForeignKey, Index, String, Table

from cluster.store import Store, metadata
from cluster.tenancy import acts, paging, projects
from cluster.tenancy.acts import Note, Rows, unnoted
from cluster.tenancy.paging import FIRST, Asked, Page

Role = Literal["owner", "member"]

service_accounts = Table(
    "service_accounts",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("project_id", String(63), ForeignKey("projects.id", name="fk_service_accounts_project"), nullable=False),
    Column("name", String(100), nullable=False),
    Column("role", String(16), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("deleted_at", Float(53)),
    Index("ix_service_accounts_project_id_created_at", "project_id", "created_at"),
)


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    id: str
    project: str
    name: str
    role: Role
    created_at: float


class ServiceAccounts:
    """The service accounts in the store. Every verb raises NotFound for what isn't there or is another organization's."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time, note: Note = unnoted) -> None:
        self._store = store
        self._clock = clock
        self._note = note

    def create(self, organization: str, project: str, name: str) -> ServiceAccount:
        """Raises InvalidRequest, and Conflict for an archived project."""
        paging.checked_name(name)
        with acts.begin(self._store, self._note, organization) as rows:
            projects.find_live(rows.connection, organization, project)
            return insert(rows, project, name, self._clock())

    def get(self, organization: str, project: str, account: str) -> ServiceAccount:
        with self._store.read() as connection:
            projects.find(connection, organization, project)
            return find(connection, project, account)

    def list(self, organization: str, project: str, asked: Asked = FIRST) -> Page[ServiceAccount]:
        with self._store.read() as connection:
            projects.find(connection, organization, project)
            by = service_accounts.c.created_at, service_accounts.c.id
            return paging.read(connection, _live(project), by, asked, _account)

    def update(
        self, organization: str, project: str, account: str, *, name: str | None = None, role: Role | None = None
    ) -> ServiceAccount:
        """Raises InvalidRequest."""
        changes: dict[str, str] = {}
        if name is not None:
            changes["name"] = paging.checked_name(name)
        if role is not None:
            changes["role"] = role
        with acts.begin(self._store, self._note, organization) as rows:
            projects.find(rows.connection, organization, project)
            find(rows.connection, project, account)
            if changes:
                rows.update("service_account.updated", service_accounts, service_accounts.c.id == account, changes)
            return find(rows.connection, project, account)

    def delete(self, organization: str, project: str, account: str) -> None:
        """Its keys end with it."""
        with acts.begin(self._store, self._note, organization) as rows:
            projects.find(rows.connection, organization, project)
            find(rows.connection, project, account)
            same = service_accounts.c.id == account
            rows.update("service_account.deleted", service_accounts, same, {"deleted_at": self._clock()})


def insert(rows: Rows, project: str, name: str, now: float) -> ServiceAccount:
    made = ServiceAccount(paging.new_id("svc_acct"), project, name, "member", now)
    values = {"id": made.id, "project_id": project, "name": name, "role": made.role, "created_at": now}
    rows.insert("service_account.created", service_accounts, values)
    return made


def find(connection: Connection, project: str, account: str) -> ServiceAccount:
    """Raises NotFound."""
    row = connection.execute(_live(project).where(service_accounts.c.id == account)).one_or_none()
    return _account(paging.only(row, "service account"))


def _live(project: str) -> sa.Select[Any]:
    return sa.select(service_accounts).where(service_accounts.c.project_id == project, service_accounts.c.deleted_at.is_(None))


def _account(row: Any) -> ServiceAccount:
    return ServiceAccount(row.id, row.project_id, row.name, row.role, row.created_at)
