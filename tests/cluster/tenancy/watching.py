"""What an act changed in the database, held against what the audit log says of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from cluster.store import Store, metadata
from cluster.tenancy.audit import Audit
from cluster.tenancy.chain import Record
from cluster.tenancy.redaction import facts

DERIVED = {"balances", "postings", "entries", "counters"}
"""What the ledger books of a grant or an invoice: its own log that nobody can change."""


@dataclass
class Watched:
    """`changed` and `told`: before and after of every row, as the database has them and as new records have them."""

    records: list[Record] = field(default_factory=list)
    changed: list[tuple[str | None, str | None]] = field(default_factory=list)

    @property
    def told(self) -> list[tuple[str | None, str | None]]:
        return [(record.before, record.after) for record in self.records if record.before or record.after]

    @property
    def actions(self) -> list[str]:
        return [record.action for record in self.records]

    def check(self) -> None:
        """Each row that changed has one record of just that; there are records, and they tell nothing else."""
        assert self.records, "no record"
        assert sorted(self.told, key=str) == sorted(self.changed, key=str)


@contextmanager
def watching(store: Store, audit: Audit) -> Iterator[Watched]:
    seen, start, before = Watched(), audit.head().number, rows(store)
    yield seen
    after = rows(store)
    seen.records += [record for record in audit.records() if record.number > start]
    for key in sorted(before.keys() | after.keys(), key=str):
        was, now = before.get(key), after.get(key)
        if _without_use(was) != _without_use(now):
            seen.changed.append((facts(was), facts(now)))


def rows(store: Store) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Every row of every table but the log's by table and primary key, without bytes."""
    found = {}
    with store.read() as connection:
        for table in metadata.sorted_tables:
            if not table.name.startswith("audit_") and table.name not in DERIVED:
                for row in connection.execute(sa.select(table)):
                    known = {name: value for name, value in row._mapping.items() if not isinstance(value, bytes)}
                    found[(table.name, *(known[column.name] for column in table.primary_key))] = known
    return found


def _without_use(row: dict[str, Any] | None) -> dict[str, Any] | None:
    return row and {name: value for name, value in row.items() if name != "last_used_at"}
