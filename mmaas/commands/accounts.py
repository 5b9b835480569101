"""The accounts behind the commands that administer, and the times and tables that they show."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from cluster.tenancy.accounts import Accounts
    from cluster.tenancy.paging import Asked, Page

Item = TypeVar("Item")


@contextlib.contextmanager
def opened() -> Iterator[Accounts]:
    """The accounts in the platform's store, for who types."""
    from cluster import settings
    from mmaas.audited import accounts_of
    from mmaas.up import opened_store

    loaded = settings.load()
    with opened_store(loaded) as store:
        yield accounts_of(store, loaded)


def every(page: Callable[[Asked], Page[Item]], key: Callable[[Item], str]) -> list[Item]:
    """The items of all pages."""
    from cluster.tenancy.paging import MOST, Asked

    found: list[Item] = []
    while True:
        read = page(Asked(MOST, key(found[-1]) if found else None))
        found += read.items
        if not read.has_more:
            return found


def say(told: dict[str, object], text: str, *, as_json: bool) -> None:
    """What was made: all of it for programs, one line for people."""
    from mmaas.output import console, write_json

    if as_json:
        write_json(told)
    else:
        console().print(text, markup=False, soft_wrap=True)


def day(seconds: float | None) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M") if seconds else ""


def show(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table of texts as they are: nothing in them is markup."""
    from rich.table import Table
    from rich.text import Text

    from mmaas.output import console

    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*map(Text, row))
    console().print(table)
