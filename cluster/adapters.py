"""The LoRA adapters that callers may name, as rows of the store. Their files are in the library; nothing here reads them."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable

import sqlalchemy as sa

from cluster.errors import InvalidRequest, ModelNotFound
from cluster.store import Store, adapters
from cluster.tenancy import acts
from cluster.tenancy.acts import Note, unnoted
from cluster.types import NAME, Adapter

_ADDRESS = re.compile(r"[0-9a-f]{64}")


class Catalog:
    """The rows of the `adapters` table as `Adapter`s."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time, note: Note = unnoted) -> None:
        """`note` writes changes into the audit log (`Audit.by`)."""
        self._store = store
        self._clock = clock
        self._note = note

    def put(self, adapter: Adapter) -> Adapter:
        """Insert, or let the name stand for other files from now on. Raises InvalidRequest for a name that can't be one."""
        for name in (adapter.base, adapter.name):
            if NAME.match(name) is None:
                raise InvalidRequest(f"{name!r:.80} can't be the name of a model or an adapter", param="name")
        if _ADDRESS.fullmatch(adapter.address) is None:
            raise InvalidRequest(f"{adapter.address!r:.80} is no address of the library", param="address")
        row = dataclasses.replace(adapter, created_at=self._clock())
        with acts.begin(self._store, self._note) as rows:
            same = _is(adapter.base, adapter.name)
            rows.put("adapter.added", adapters, same, dataclasses.asdict(row), lambda _: row.model)
        return row

    def list(self) -> list[Adapter]:
        """All of them by base and name."""
        with self._store.read() as connection:
            rows = connection.execute(sa.select(adapters).order_by(adapters.c.base, adapters.c.name)).all()
        return [Adapter(**row._mapping) for row in rows]

    def delete(self, base: str, name: str) -> None:
        """Raises ModelNotFound when there is no such adapter. Its files stay in the library."""
        with acts.begin(self._store, self._note) as rows:
            gone = rows.delete("adapter.removed", adapters, _is(base, name), lambda _: f"{base}:{name}")
        if not gone:
            raise ModelNotFound(f"there is no adapter {base}:{name}", param="model")


def _is(base: str, name: str) -> sa.ColumnElement[bool]:
    return sa.and_(adapters.c.base == base, adapters.c.name == name)
