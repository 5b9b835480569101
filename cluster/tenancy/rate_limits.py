"""What a project may ask for in a minute: rows of the store, read by every gateway and written by administrators.

A row bounds the sum of all calls that it covers. `ANY` stands for every model or every key, so a row may bound a project, its use
of one model, one key, or one key's use of one model; a call has to fit all rows that cover it. Adapters count as their base.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Integer, String, Table

from cluster.errors import InvalidRequest
from cluster.store import Store, metadata
from cluster.tenancy import acts, projects
from cluster.tenancy.acts import Note, Row, unnoted
from cluster.types import NAME

PREFIX = "rl-"
ANY = "*"
MOST = 1_000_000_000
"""The largest limit. Who sets it, or more, bounds nothing."""

_KEY_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

rate_limits = Table(
    "rate_limits",
    metadata,
    Column("project", String(63), primary_key=True),
    Column("model", String(127), primary_key=True),
    Column("key_id", String(64), primary_key=True),
    Column("requests", BigInteger),  # a minute
    Column("tokens", BigInteger),  # a minute
    Column("streams", Integer),  # at once
)


@dataclass(frozen=True, slots=True)
class RateLimit:
    """Requests and tokens a minute, and streams at once; None: not bounded by this row."""

    project: str
    model: str = ANY
    key_id: str = ANY
    requests: int | None = None
    tokens: int | None = None
    streams: int | None = None

    @property
    def id(self) -> str:
        """`rl-MODEL`, or `rl-MODEL@KEY` for one key alone, unique within the project."""
        return f"{PREFIX}{self.model}" + (f"@{self.key_id}" if self.key_id != ANY else "")

    @property
    def bounds_nothing(self) -> bool:
        return self.requests is None and self.tokens is None and self.streams is None

    def covers(self, model: str, key_id: str) -> bool:
        """`model` as callers write it: a name, or BASE:ADAPTER."""
        return self.model in (ANY, model.partition(":")[0]) and self.key_id in (ANY, key_id)


class RateLimits:
    """The rows. Reads and writes block."""

    def __init__(self, store: Store, note: Note = unnoted) -> None:
        self._store = store
        self._note = note

    def of(self, project: str) -> tuple[RateLimit, ...]:
        """By model and key."""
        query = sa.select(rate_limits).where(rate_limits.c.project == project).order_by(rate_limits.c.model, rate_limits.c.key_id)
        with self._store.read() as connection:
            return tuple(RateLimit(*row) for row in connection.execute(query))

    def put(self, limit: RateLimit) -> RateLimit | None:
        """Set one row and return what it was; one that bounds nothing is taken away. Raises InvalidRequest."""
        _check(limit)
        same = sa.and_(*[rate_limits.c[name] == getattr(limit, name) for name in ("project", "model", "key_id")])
        with acts.begin(self._store, self._note) as begun:
            rows = begun.at(projects.organization_of(begun.connection, limit.project))
            before = rows.connection.execute(sa.select(rate_limits).where(same)).one_or_none()
            if limit.bounds_nothing:
                rows.delete("rate_limit.deleted", rate_limits, same, _id)
            else:
                rows.put("rate_limit.updated", rate_limits, same, asdict(limit), _id)
        return RateLimit(*before) if before is not None else None


def _id(row: Row) -> str:
    return RateLimit(**row).id


def _check(limit: RateLimit) -> None:
    if NAME.match(limit.project) is None and _KEY_ID.fullmatch(limit.project) is None:
        raise InvalidRequest(f"{limit.project[:64]!r} is not a project", param="project_id")
    if limit.model != ANY and NAME.match(limit.model) is None:
        raise InvalidRequest(f"{limit.model[:64]!r} is not a model's name, nor {ANY!r} for every model", param="model")
    if limit.key_id != ANY and _KEY_ID.fullmatch(limit.key_id) is None:
        raise InvalidRequest(f"{limit.key_id[:64]!r} is not a key's id, nor {ANY!r} for every key", param="key_id")
    for name in ("requests", "tokens", "streams"):
        value = getattr(limit, name)
        if value is not None and not 0 <= value < MOST:
            raise InvalidRequest(f"{name} must be between 0 and {MOST - 1}", param=name, code="integer_out_of_range")
