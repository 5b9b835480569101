"""Lists in pages: from oldest to newest or the other way, each page after the last item of the one before.

A page is found by that item's time and id, so that what is added or removed meanwhile neither repeats nor hides another item.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection

from cluster.errors import Conflict, InvalidRequest, NotFound

T = TypeVar("T")
MOST = 100


@dataclass(frozen=True, slots=True)
class Asked:
    """Which page: at most `limit` items (1 to `MOST`) behind the one with the id `after`."""

    limit: int = 20
    after: str | None = None
    order: Literal["asc", "desc"] = "asc"


FIRST = Asked()


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    items: Sequence[T]
    has_more: bool


def read(connection: Connection, query: sa.Select[Any], by: tuple[Any, Any], asked: Asked, make: Callable[[Any], T]) -> Page[T]:
    """A page of `query` in the order of `by`: the columns of time and id. Raises InvalidRequest for an `after` that isn't in it."""
    created, key = by
    is_up = asked.order == "asc"
    if asked.after is not None:
        place = query.where(key == asked.after).with_only_columns(created, key, maintain_column_froms=True)
        last = connection.execute(place).first()
        if last is None:
            raise InvalidRequest("after is not the id of an item of this list.", param="after")
        here, there = sa.tuple_(created, key), sa.tuple_(sa.literal(last[0], sa.Float(53)), sa.literal(last[1]))
        query = query.where(here > there if is_up else here < there)
    ordered = query.order_by(created, key) if is_up else query.order_by(created.desc(), key.desc())
    rows = connection.execute(ordered.limit(asked.limit + 1)).all()
    return Page([make(row) for row in rows[: asked.limit]], len(rows) > asked.limit)


def sliced(items: Sequence[T], key: Callable[[T], str], asked: Asked, before: str | None = None) -> Page[T]:
    """A page of a list in memory, oldest first; also the page before an item. Raises InvalidRequest for unknown ids."""
    ordered = list(items) if asked.order == "asc" else list(reversed(items))
    ids = [key(item) for item in ordered]
    for name, given in (("after", asked.after), ("before", before)):
        if given is not None and given not in ids:
            raise InvalidRequest(f"{name} is not the id of an item of this list.", param=name)
    first = ids.index(asked.after) + 1 if asked.after is not None else 0
    last = ids.index(before) if before is not None else len(ids)
    found = ordered[first:last]
    backwards = before is not None and asked.after is None
    shown = found[max(0, len(found) - asked.limit) :] if backwards else found[: asked.limit]
    return Page(shown, len(found) > len(shown))


def only(row: T | None, what: str) -> T:
    """The row. Raises NotFound, in words that are the same for what isn't there and for what is somebody else's."""
    if row is None:
        raise NotFound(f"There is no such {what}.")
    return row


@contextmanager
def unique(message: str) -> Iterator[None]:
    """Around an insert: raises Conflict for a row that is there already, also when another process was first."""
    try:
        yield
    except sa.exc.IntegrityError:
        raise Conflict(message) from None


def checked_name(name: str, param: str = "name", most: int = 100) -> str:
    """Raises InvalidRequest."""
    if not (0 < len(name) <= most and name.isprintable() and name.strip()):
        raise InvalidRequest(f"{param} is 1 to {most} printable characters, not only spaces.", param=param)
    return name


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
