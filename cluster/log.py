"""Logs: one JSON object a line on stderr, with the fields of the request that is being worked on.

Every module logs with `logging.getLogger(__name__)`; the process's composition root calls `configure` once. `bind` puts fields
(request_id, tenant, model) into every record of the current task. Knows nothing about what is logged; callers never log secrets.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TextIO

_fields: ContextVar[Mapping[str, object]] = ContextVar("mmaas_log_fields", default={})  # noqa: B039 - never mutated
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_KEY = re.compile(r"(mk[a-z_]*_[0-9a-f]{12})[0-9a-f]{64,72}")
"""A key of ours that a caller put where it doesn't belong: into a name, a path, a message. Its id stays."""
_QUIET = ("httpx", "httpcore", "urllib3", "alembic", "asyncio")


@contextlib.contextmanager
def bind(**fields: object) -> Iterator[None]:
    """Add fields to every record logged inside, in this task and in tasks started from it.

    The earlier value is set again by hand: a stream's generator may be closed from another context, where a token's reset fails.
    """
    before = _fields.get()
    _fields.set({**before, **fields})
    try:
        yield
    finally:
        _fields.set(before)


def bound() -> Mapping[str, object]:
    """The fields of the current task."""
    return _fields.get()


class JsonFormatter(logging.Formatter):
    """One line a record. Pure ASCII: escaped control characters can neither forge a line nor drive a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        line |= {key: value for key, value in {**bound(), **extra}.items() if key not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _KEY.sub(r"\1...", json.dumps(line, ensure_ascii=True, default=str).replace("\x7f", "\\u007f"))


class _OurHandler(logging.StreamHandler[TextIO]):
    """Marks the handler that `configure` installed, so that a second call replaces it."""


def configure(level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send the root logger's records to `stream` (stderr) as JSON lines; calling again replaces the earlier choice."""
    handler = _OurHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [other for other in root.handlers if not isinstance(other, _OurHandler)] + [handler]
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
