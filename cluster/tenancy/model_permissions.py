"""Which models a project may use: none but the listed ones, or all but them. Without a row, all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa
from sqlalchemy import Column, String, Table, Text

from cluster.errors import InvalidRequest
from cluster.store import Store, metadata
from cluster.tenancy import acts, projects
from cluster.tenancy.acts import Note, unnoted

MAX_MODELS = 1000
Mode = Literal["allow_list", "deny_list"]

model_permissions = Table(
    "model_permissions",
    metadata,
    Column("project", String(63), primary_key=True),
    Column("mode", String(16), nullable=False),
    Column("models", Text, nullable=False),  # a JSON list
)


@dataclass(frozen=True, slots=True)
class Permission:
    mode: Mode = "deny_list"
    models: tuple[str, ...] = ()

    def permits(self, model: str) -> bool:
        """`model` as callers write it. A listed model stands for its adapters, too; an adapter can be listed by itself."""
        is_listed = model in self.models or model.partition(":")[0] in self.models
        return is_listed == (self.mode == "allow_list")


EVERYTHING = Permission()


class ModelPermissions:
    """The rows. Reads and writes block."""

    def __init__(self, store: Store, note: Note = unnoted) -> None:
        self._store = store
        self._note = note

    def of(self, project: str) -> Permission | None:
        """None where nobody said anything."""
        with self._store.read() as connection:
            row = connection.execute(sa.select(model_permissions).where(model_permissions.c.project == project)).one_or_none()
        return None if row is None else Permission(row.mode, tuple(json.loads(row.models)))

    def put(self, project: str, mode: Mode, models: Sequence[str]) -> Permission:
        """Raises InvalidRequest."""
        if mode not in ("allow_list", "deny_list"):
            raise InvalidRequest("mode is allow_list or deny_list", param="mode")
        if len(models) > MAX_MODELS or not all(0 < len(model) <= 256 for model in models):
            raise InvalidRequest(f"model_ids are at most {MAX_MODELS} names of 1 to 256 characters", param="model_ids")
        permission = Permission(mode, tuple(dict.fromkeys(models)))
        row = {"project": project, "mode": mode, "models": json.dumps(permission.models)}
        with acts.begin(self._store, self._note) as begun:
            rows = begun.at(projects.organization_of(begun.connection, project))
            rows.put("project.updated", model_permissions, model_permissions.c.project == project, row, "project")
        return permission

    def delete(self, project: str) -> bool:
        """Whether there was a row."""
        with acts.begin(self._store, self._note) as begun:
            rows = begun.at(projects.organization_of(begun.connection, project))
            return bool(rows.delete("project.updated", model_permissions, model_permissions.c.project == project, "project"))
