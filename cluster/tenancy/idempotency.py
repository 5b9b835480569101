"""One execution for one `Idempotency-Key`: who may run, who gets the stored answer, and who must wait.

A key belongs to a tenant and to the request it first came with. Whoever runs holds a lease and renews it; when a gateway is killed
its lease ends and the next call with the key takes over. Only whole, successful answers are stored, for a day. A tenant's answers
are bounded in number and bytes: what is too long or too much is not kept, but its key is, so that nothing runs a second time.
Knows nothing of HTTP beyond status, headers and bytes.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Connection, Float, Index, Integer, LargeBinary, String, Table, Text

from cluster.errors import Conflict, InProgress, InvalidRequest, KeyReused, Overloaded
from cluster.store import Store, metadata

idempotency = Table(
    "idempotency",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("key", LargeBinary(32), primary_key=True),  # SHA-256 of the caller's key
    Column("request", LargeBinary(32), nullable=False),  # SHA-256 of what was asked
    Column("run", String(32)),  # who works on it; None: done
    Column("lease_until", Float(53), nullable=False),
    Column("expires_at", Float(53), nullable=False, index=True),
    Column("status", Integer),
    Column("headers", Text),  # JSON
    Column("body", LargeBinary),  # None once done: it was too long to keep, or gave way to newer ones
    Column("bytes", BigInteger, nullable=False),  # of the body, if it is there
    Index("ix_idempotency_tenant_expires_at", "tenant", "expires_at"),
)

idempotency_totals = Table(
    "idempotency_totals",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("rows", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
)

KEEP_S = 24 * 3600.0
"""How long an answer can be had again, from its end."""

LEASE_S = 30.0
"""How long a run counts as alive after its last word; renew three times as often."""

MAX_KEY = 255


@dataclass(frozen=True, slots=True)
class Bounds:
    answer_bytes: int = 1 << 20
    """Longest answer that is stored."""
    tenant_bytes: int = 64 << 20
    """Bodies that are stored for one tenant; the oldest give way."""
    tenant_rows: int = 100_000
    """Keys that are remembered for one tenant; more are refused until old ones expire."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered: `headers` are those that belong to the body."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class Replay:
    """The call was answered before: this is the answer."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class Run:
    """The caller of `begin` is the one who executes, until its lease ends; then `finish` or `release`."""

    tenant: str
    key: bytes
    id: str
    took_over: bool = False


class Idempotency:
    def __init__(self, store: Store, bounds: Bounds | None = None, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self.bounds = bounds or Bounds()
        self._clock = clock

    def begin(self, tenant: str, key: str, request: bytes) -> Replay | Run:
        """`request` is the digest of everything that makes it this request.

        Raises InvalidRequest for a key that is none, KeyReused for another request, InProgress while somebody works on it, Conflict
        when the answer is no longer there and Overloaded when the tenant has too many keys.
        """
        hashed, now, run = digest_of(key), self._clock(), secrets.token_hex(16)
        with self._store.begin() as connection:
            self._lock(connection, tenant)
            found = connection.execute(sa.select(idempotency).where(*_same(tenant, hashed))).one_or_none()
            if found is None or found.expires_at <= now:
                self._insert(connection, tenant, hashed, request, run, replaces=found)
                return Run(tenant, hashed, run)
            if found.request != request:
                raise KeyReused("This Idempotency-Key was used for another request before: use a new one.")
            if found.run is None:
                return _replayed(found)
            if found.lease_until > now:
                raise InProgress("A request with this Idempotency-Key is being worked on.", retry_after_s=1.0)
            lease = {"run": run, "lease_until": now + LEASE_S, "expires_at": now + KEEP_S}
            connection.execute(idempotency.update().where(*_same(tenant, hashed)).values(lease))
            return Run(tenant, hashed, run, took_over=True)

    def finish(self, run: Run, answer: Answer | None) -> bool:
        """Store the answer (None: it was too long) for whoever comes again. False when the lease was lost to another."""
        with self._store.begin() as connection:
            return self.finish_on(connection, run, answer)

    def finish_on(self, connection: Connection, run: Run, answer: Answer | None) -> bool:
        """`finish`, as a part of somebody's transaction."""
        now, body = self._clock(), answer.body if answer and len(answer.body) <= self.bounds.answer_bytes else None
        size = len(body or b"")
        done = {
            "run": None,
            "status": answer.status if answer else None,
            "headers": json.dumps(answer.headers) if answer else None,
            "body": body,
            "bytes": size,
            "expires_at": now + KEEP_S,
        }
        total = self._lock(connection, run.tenant)
        mine = connection.execute(idempotency.update().where(*_of(run)).values(done)).rowcount == 1
        if mine:
            _add(connection, run.tenant, rows=0, bytes_=size)
            self._make_room(connection, run, total + size - self.bounds.tenant_bytes)
        return mine

    def release(self, run: Run) -> None:
        """There is no answer worth keeping: the next call with the key runs."""
        with self._store.begin() as connection:
            self._lock(connection, run.tenant)
            gone = connection.execute(idempotency.delete().where(*_of(run))).rowcount
            _add(connection, run.tenant, rows=-gone, bytes_=0)

    def renew(self, runs: Iterable[Run]) -> None:
        """These are still being worked on, and are remembered for a day from now: a run may last longer than that. As everywhere a
        tenant's lock comes first, and here it is the only one, so that nobody waits in a ring."""
        now = self._clock()
        alive = {"lease_until": now + LEASE_S, "expires_at": now + KEEP_S}
        for tenant, own in groupby(sorted(runs, key=lambda run: run.tenant), lambda run: run.tenant):
            with self._store.begin() as connection:
                self._lock(connection, tenant)
                for run in own:
                    connection.execute(idempotency.update().where(*_of(run)).values(alive))

    def purge(self, most: int = 1000) -> int:
        """Forget keys whose day is over; returns how many."""
        query = sa.select(idempotency.c.tenant).where(idempotency.c.expires_at <= self._clock()).limit(1)
        with self._store.read() as connection:
            tenant = connection.scalar(query)
        if tenant is None:
            return 0
        with self._store.begin() as connection:
            self._lock(connection, tenant)
            rows = idempotency.c
            old = sa.select(rows.key, rows.bytes).where(rows.tenant == tenant, rows.expires_at <= self._clock()).limit(most)
            found = connection.execute(old).all()
            connection.execute(idempotency.delete().where(rows.tenant == tenant, rows.key.in_([row.key for row in found])))
            _add(connection, tenant, rows=-len(found), bytes_=-sum(row.bytes for row in found))
        return len(found)

    def _lock(self, connection: Connection, tenant: str) -> int:
        """One writer at a time for a tenant; returns the bytes that it has stored."""
        totals = idempotency_totals
        query = sa.select(totals.c.bytes).where(totals.c.tenant == tenant).with_for_update()
        bytes_ = connection.scalar(query)
        if bytes_ is None:
            fresh = {"tenant": tenant, "rows": 0, "bytes": 0}
            try:
                with connection.begin_nested():
                    connection.execute(totals.insert().values(fresh))
            except sa.exc.IntegrityError:
                pass  # another gateway was first
            bytes_ = connection.scalar(query)
        return int(bytes_ or 0)

    def _insert(
        self, connection: Connection, tenant: str, key: bytes, request: bytes, run: str, replaces: sa.Row[tuple[object, ...]] | None
    ) -> None:
        if replaces is not None:
            connection.execute(idempotency.delete().where(*_same(tenant, key)))
            _add(connection, tenant, rows=-1, bytes_=-replaces.bytes)
        rows = connection.scalar(sa.select(idempotency_totals.c.rows).where(idempotency_totals.c.tenant == tenant))
        if (rows or 0) >= self.bounds.tenant_rows:
            raise Overloaded(f"{rows} idempotency keys of the last day are remembered, the limit.", retry_after_s=60.0)
        now = self._clock()
        row = {"tenant": tenant, "key": key, "request": request, "run": run, "bytes": 0}
        connection.execute(idempotency.insert().values({**row, "lease_until": now + LEASE_S, "expires_at": now + KEEP_S}))
        _add(connection, tenant, rows=1, bytes_=0)

    def _make_room(self, connection: Connection, keep: Run, excess: int) -> None:
        """Drop the oldest bodies, never their keys."""
        rows = idempotency.c
        while excess > 0:
            oldest = (
                sa.select(rows.key, rows.bytes)
                .where(rows.tenant == keep.tenant, rows.bytes > 0)
                .order_by(rows.expires_at, rows.key)
                .limit(100)
            )
            found = connection.execute(oldest).all()
            for row in found:
                if excess > 0:
                    connection.execute(idempotency.update().where(*_same(keep.tenant, row.key)).values(body=None, bytes=0))
                    _add(connection, keep.tenant, rows=0, bytes_=-row.bytes)
                    excess -= row.bytes
            if not found:
                return


def digest_of(key: str) -> bytes:
    """Raises InvalidRequest for what can't be a key."""
    if not (0 < len(key) <= MAX_KEY and key.isascii() and key.isprintable()):
        raise InvalidRequest(f"An Idempotency-Key is 1 to {MAX_KEY} printable ASCII characters.", param="Idempotency-Key")
    return hashlib.sha256(key.encode()).digest()


def _replayed(found: sa.Row[tuple[object, ...]]) -> Replay:
    if found.body is None:
        raise Conflict(
            "The request with this Idempotency-Key was executed, but its answer is no longer kept.", code="idempotency_answer_gone"
        )
    headers = tuple((name, value) for name, value in json.loads(found.headers))
    return Replay(Answer(found.status, headers, bytes(found.body)))


def _same(tenant: str, key: bytes) -> tuple[sa.ColumnElement[bool], ...]:
    return idempotency.c.tenant == tenant, idempotency.c.key == key


def _of(run: Run) -> tuple[sa.ColumnElement[bool], ...]:
    return *_same(run.tenant, run.key), idempotency.c.run == run.id


def _add(connection: Connection, tenant: str, *, rows: int, bytes_: int) -> None:
    totals = idempotency_totals
    change = totals.update().where(totals.c.tenant == tenant)
    connection.execute(change.values(rows=totals.c.rows + rows, bytes=totals.c.bytes + bytes_))
