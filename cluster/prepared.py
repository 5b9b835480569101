"""Statements that run hundreds of times a second: compiled once for a database, then executed by its driver.

SQLAlchemy's own way looks a statement up, wraps it and unwraps its rows each time, which takes several times as long as SQLite
does for a short one. What is prepared is still an expression of SQLAlchemy's, runs in its connection's transaction and raises its
errors. Only for columns whose values need no conversion: numbers, strings and bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

Row = tuple[Any, ...]
Parameters = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Text:
    """A statement as a driver takes it. `order`: names of its parameters by place; None: it takes them by name."""

    sql: str
    order: Sequence[str] | None

    def values(self, parameters: Parameters) -> Any:
        return parameters if self.order is None else [parameters[name] for name in self.order]


class Prepared:
    """One statement. `lists`, of one that selects: parameters that are sequences (`bindparam(…, expanding=True)`), never empty."""

    def __init__(self, statement: sa.Select[Any] | sa.Insert | sa.Update | sa.Delete, *lists: str) -> None:
        self._statement, self._lists = statement, lists
        self._texts: dict[tuple[object, ...], _Text] = {}

    def rows(self, connection: Connection, **parameters: Any) -> list[Row]:
        """What it selects, in the order of its columns."""
        flat = dict(parameters)
        for name in self._lists:
            flat |= {f"{name}_{place}": value for place, value in enumerate(flat.pop(name), start=1)}
        text = self._text(connection, parameters)
        return _execute(connection, text.sql, text.values(flat))

    def run_each(self, connection: Connection, many: Sequence[Parameters]) -> None:
        """Once with each of these parameters; there is at least one."""
        text = self._text(connection, many[0])
        _execute(connection, text.sql, [text.values(parameters) for parameters in many], many=True)

    def _text(self, connection: Connection, parameters: Parameters) -> _Text:
        """Lists of another length are another text."""
        key = (connection.dialect.name, *(len(parameters[name]) for name in self._lists))
        if (text := self._texts.get(key)) is None:
            statement = self._statement.params(parameters) if self._lists else self._statement
            compiled = statement.compile(dialect=connection.dialect, compile_kwargs={"render_postcompile": True})
            text = self._texts[key] = _Text(str(compiled), compiled.positiontup)
        return text


def _execute(connection: Connection, sql: str, values: Any, *, many: bool = False) -> list[Row]:
    driver = connection.dialect.loaded_dbapi
    cursor = connection.connection.cursor()
    try:
        (cursor.executemany if many else cursor.execute)(sql, values)
        return list(cursor.fetchall()) if cursor.description else []
    except driver.Error as error:
        if connection.dialect.is_disconnect(error, connection.connection.driver_connection, cursor):
            connection.invalidate(error)
        raise sa.exc.DBAPIError.instance(sql, values, error, driver.Error, dialect=connection.dialect) from error
    finally:
        cursor.close()
