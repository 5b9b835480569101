"""Administrative acts: rows that change together with the audit log, in one transaction: there is neither without the other.

What a row was and became is read from the database itself, and each row that changes has a record of its own. Records are appended
last in a transaction, since other writers of the log wait from then on. An act that changes nothing leaves none. Who acts is the
note's to know (`Audit.by`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, LargeBinary, Table

from cluster.store import Store
from cluster.tenancy import paging

Row = Mapping[str, Any]
"""Of a table, by column, without those of bytes: these are digests of secrets."""
Target = str | Callable[[Row], str]
"""What a record is of: a column's value, or what is made of a row."""


@dataclass(frozen=True, slots=True)
class Change:
    """What was done, of what, in which organization and project; what it was before and after, None where there was nothing."""

    action: str
    target: str
    before: Row | None
    after: Row | None
    organization: str
    project: str | None


Note = Callable[[Connection, Change], None]
"""Writes down a change in the transaction that makes it."""


def unnoted(connection: Connection, change: Change) -> None:
    """Where there is no audit log."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows that one act changes. Organization and project are where it is recorded; a row that names its project is there."""

    connection: Connection
    organization: str = ""
    project: str | None = None
    changes: list[Change] = field(default_factory=list)

    def at(self, organization: str, project: str | None = None) -> Rows:
        """The same act, in another place."""
        return replace(self, organization=organization, project=project)

    def insert(self, action: str, table: Table, values: Row, target: Target = "id") -> Row:
        """The row as it is stored. Raises IntegrityError for one that is there already (`paging.unique`)."""
        made = self.connection.execute(table.insert().values(values)).inserted_primary_key
        [after] = self._read(table, _is(table, made))
        self._changed(action, target, None, after)
        return after

    def update(self, action: str, table: Table, where: sa.ColumnElement[bool], values: Row, target: Target = "id") -> Sequence[Row]:
        """The rows as they became."""
        rows = []
        for before in self._read(table, where):
            same = _is(table, [before[column.name] for column in table.primary_key])
            self.connection.execute(table.update().where(same).values(values))
            [after] = self._read(table, same)
            self._changed(action, target, before, after)
            rows.append(after)
        return rows

    def put(self, action: str, table: Table, where: sa.ColumnElement[bool], values: Row, target: Target = "id") -> None:
        """Update the row, or insert one. Raises Conflict when somebody else inserts it at the same time."""
        if not self.update(action, table, where, values, target):
            with paging.unique("Somebody else changes this at the same time: try again."):
                self.insert(action, table, values, target)

    def delete(self, action: str, table: Table, where: sa.ColumnElement[bool], target: Target = "id") -> Sequence[Row]:
        """The rows that were."""
        gone = self._read(table, where)
        self.connection.execute(table.delete().where(where))
        for before in gone:
            self._changed(action, target, before, None)
        return gone

    def write(self, note: Note) -> None:
        for change in self.changes:
            note(self.connection, change)

    def _read(self, table: Table, where: sa.ColumnElement[bool]) -> list[Row]:
        """Nobody else changes them until the transaction ends."""
        shown = [column for column in table.c if not isinstance(column.type, LargeBinary)]
        query = sa.select(*shown).where(where).order_by(*table.primary_key).with_for_update()
        return [dict(row._mapping) for row in self.connection.execute(query)]

    def _changed(self, action: str, target: Target, before: Row | None, after: Row | None) -> None:
        if before == after:
            return
        row = after or before or {}
        of = str(row[target]) if isinstance(target, str) else target(row)
        project = row.get("project_id") or row.get("project") or self.project
        self.changes.append(Change(action, of, before, after, self.organization, project))


@contextmanager
def begin(store: Store, note: Note, organization: str = "", project: str | None = None) -> Iterator[Rows]:
    """One act in a transaction of its own."""
    with store.begin() as connection, within(connection, note, organization, project) as rows:
        yield rows


@contextmanager
def within(connection: Connection, note: Note, organization: str = "", project: str | None = None) -> Iterator[Rows]:
    """One act in a transaction that does more."""
    rows = Rows(connection, organization, project)
    yield rows
    rows.write(note)


def _is(table: Table, key: Any) -> sa.ColumnElement[bool]:
    return sa.and_(*[column == value for column, value in zip(table.primary_key, key, strict=True)])
