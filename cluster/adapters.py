"""The LoRA adapters that callers may name, as rows of the store. Their files are in the library; nothing here reads them."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable

import sqlalchemy as sa

from cluster.errors import InvalidRequest, ModelNotFound
from cluster.store import Store, adapters
from cluster.types import NAME, Adapter

_ADDRESS = re.compile(r"[0-9a-f]{64}")


class Catalog:
    """The rows of the `adapters` table as `Adapter`s."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    def put(self, adapter: Adapter) -> Adapter:
        """Insert, or let the name stand for other files from now on. Raises InvalidRequest for a name that can't be one."""
        for name in (adapter.base, adapter.name):
            if NAME.match(name) is None:
                raise InvalidRequest(f"{name!r:.80} can't be the name of a model or an adapter", param="name")
        if _ADDRESS.fullmatch(adapter.address) is None:
            raise InvalidRequest(f"{adapter.address!r:.80} is no address of the library", param="address")
        row = dataclasses.replace(adapter, created_at=self._clock())
        with self._store.begin() as connection:
            connection.execute(adapters.delete().where(_is(adapter.base, adapter.name)))
            connection.execute(adapters.insert().values(dataclasses.asdict(row)))
        return row

    def list(self) -> list[Adapter]:
        """All of them by base and name."""
        with self._store.read() as connection:
            rows = connection.execute(sa.select(adapters).order_by(adapters.c.base, adapters.c.name)).all()
        return [Adapter(**row._mapping) for row in rows]

    def delete(self, base: str, name: str) -> None:
        """Raises ModelNotFound when there is no such adapter. Its files stay in the library."""
        with self._store.begin() as connection:
            gone = connection.execute(adapters.delete().where(_is(base, name))).rowcount
        if not gone:
            raise ModelNotFound(f"there is no adapter {base}:{name}", param="model")


def _is(base: str, name: str) -> sa.ColumnElement[bool]:
    return sa.and_(adapters.c.base == base, adapters.c.name == name)
