"""The audit log in the store: every administrative act and every denial, appended and never changed.

An act is recorded in the transaction that does it (`connection`), so there is none without its record. Writers take the row of the
head first, on SQLite with the database's one lock, so all of them build one chain. `chain.py` says what makes it true; triggers in
the database refuse changes by mistake, signatures reveal those on purpose.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from sqlalchemy import BigInteger, Column, Connection, Float, Integer, LargeBinary, String, Table, Text

from cluster.errors import NotFound, StorageError
from cluster.private_files import private_directory, read_private, write_private
from cluster.store import Store, metadata
from cluster.tenancy import chain
from cluster.tenancy.acts import Change, Note
from cluster.tenancy.chain import Actor, Head, Problem, Record
from cluster.tenancy.redaction import facts, without_keys

audit_log = Table(
    "audit_log",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("id", String(40), nullable=False, unique=True),
    Column("at", Float(53), nullable=False, index=True),
    Column("organization", String(63), nullable=False),
    Column("project", String(63)),
    Column("actor_kind", String(16), nullable=False),
    Column("actor_id", String(128), nullable=False),
    Column("actor_email", String(256)),
    Column("actor_address", String(64)),
    Column("action", String(64), nullable=False),
    Column("target", String(256)),
    Column("before", Text),
    Column("after", Text),
    Column("request_id", String(64)),
    Column("previous", LargeBinary(32), nullable=False),
    Column("digest", LargeBinary(32), nullable=False),
)

audit_head = Table(
    "audit_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),  # 1: there is one chain
    Column("number", BigInteger, nullable=False),
    Column("digest", LargeBinary(32), nullable=False),
    Column("at", Float(53), nullable=False),
    Column("signature", LargeBinary(64), nullable=False),  # empty before the first record
)

audit_checkpoints = Table(
    "audit_checkpoints",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("digest", LargeBinary(32), nullable=False),
    Column("at", Float(53), nullable=False),
    Column("signature", LargeBinary(64), nullable=False),
)

CHECKPOINT_EVERY = 256
"""Records between two heads that are kept in the database; one that is kept elsewhere is worth more (`Audit.head`)."""

MAX_PROBLEMS = 100
_BATCH = 1000


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which records to list. Nothing said: all of them."""

    organization: str | None = None
    projects: Sequence[str] = ()
    actions: Sequence[str] = ()
    actors: Sequence[str] = ()
    emails: Sequence[str] = ()
    targets: Sequence[str] = ()
    since: float | None = None  # inclusive
    until: float | None = None  # exclusive


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify` found. `problems` are the first ones only."""

    records: int
    head: Head
    problems: tuple[Problem, ...]


class Audit:
    """`key` is the platform's signing key: 32 secret bytes (`Secrets.audit_key`)."""

    def __init__(self, store: Store, key: bytes, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._key = Ed25519PrivateKey.from_private_bytes(key)
        self._clock = clock

    @property
    def public_key(self) -> Ed25519PublicKey:
        return self._key.public_key()

    def record(
        self,
        actor: Actor,
        action: str,
        target: str | None = None,
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
        *,
        organization: str = "",
        project: str | None = None,
        request_id: str | None = None,
        connection: Connection | None = None,
    ) -> Record:
        """Append. With `connection` it is part of that transaction: record last in it, for other writers wait from then on."""
        draft = Record(
            number=0,
            id=f"audit_log-{secrets.token_hex(12)}",
            at=float(self._clock()),
            organization=_clean(organization, 63),
            project=_cut(project, 63),
            actor=Actor(actor.kind, _clean(actor.id, 128), _cut(actor.email, 256), _cut(actor.address, 64)),
            action=_clean(action, 64),
            target=_cut(target, 256),
            before=facts(before),
            after=facts(after),
            request_id=_cut(request_id, 64),
            previous=chain.START,
        )
        with nullcontext(connection) if connection is not None else self._store.begin() as opened:
            return self._append(opened, draft)

    def by(self, actor: Actor, request_id: str | None = None) -> Note:
        """For parts whose acts are recorded in their own transactions (`acts.py`), whoever acts."""

        def note(connection: Connection, change: Change) -> None:
            self.record(
                *(actor, change.action, change.target, change.before, change.after),
                organization=change.organization,
                project=change.project,
                request_id=request_id,
                connection=connection,
            )

        return note

    def _append(self, connection: Connection, draft: Record) -> Record:
        head = _head(connection, locked=True)
        linked = replace(draft, number=head.number + 1, previous=head.digest)
        record = replace(linked, digest=linked.computed())
        signed = Head(record.number, record.digest, record.at).signed(self._key)
        connection.execute(audit_log.insert().values(_row(record)))
        connection.execute(audit_head.update().values(_head_row(signed)))
        if record.number % CHECKPOINT_EVERY == 0:
            connection.execute(audit_checkpoints.insert().values(_head_row(signed)))
        return record

    def head(self) -> Head:
        """How far the log has come, signed: worth keeping where the database's owner can't write."""
        with self._store.read() as connection:
            return _head(connection)

    def list(self, wanted: Wanted, *, limit: int, after: str | None = None, before: str | None = None) -> tuple[list[Record], bool]:
        """The newest first, and whether there are more that way. `after` and `before` are ids of records of the same
        organization; with `before` those just newer than it. Raises NotFound for an id that isn't there."""
        query = sa.select(audit_log).where(*_conditions(wanted))
        with self._store.read() as connection:
            if after is not None:
                query = query.where(audit_log.c.number < _number(connection, after, wanted))
            if before is not None:
                query = query.where(audit_log.c.number > _number(connection, before, wanted))
            forward = before is not None and after is None
            order = audit_log.c.number.asc() if forward else audit_log.c.number.desc()
            rows = connection.execute(query.order_by(order).limit(limit + 1)).all()
        found = [_record(row) for row in rows[:limit]]
        return (found[::-1] if forward else found), len(rows) > limit

    def records(self, upto: int | None = None) -> Iterator[Record]:
        """All in order, read a batch at a time, so that no writer waits for a reader."""
        last = 0
        while True:
            query = sa.select(audit_log).where(audit_log.c.number > last).order_by(audit_log.c.number).limit(_BATCH)
            with self._store.read() as connection:
                rows = connection.execute(query if upto is None else query.where(audit_log.c.number <= upto)).all()
            for row in rows:
                yield _record(row)
            if len(rows) < _BATCH:
                return
            last = rows[-1].number

    def checkpoints(self) -> Sequence[Head]:
        with self._store.read() as connection:
            return [_head_of(row) for row in connection.execute(sa.select(audit_checkpoints).order_by(audit_checkpoints.c.number))]

    def verify(self, kept: Sequence[Head] = ()) -> Verdict:
        """Prove the whole log against its own checkpoints, its head, and heads that were `kept` elsewhere."""
        with self._store.read() as connection:
            head = _head(connection)
            highest = connection.scalar(sa.select(sa.func.max(audit_log.c.number))) or 0
        heads = [*self.checkpoints(), *kept, *([head] if head.number or head.signature else [])]
        found = list(_first(chain.problems(self.records(upto=highest), heads, self.public_key), MAX_PROBLEMS))
        if highest > head.number:
            found.append(Problem(head.number + 1, f"{highest - head.number} records after the head, which no writer leaves"))
        return Verdict(highest, head, tuple(found))


def _head(connection: Connection, *, locked: bool = False) -> Head:
    query = sa.select(audit_head).where(audit_head.c.id == 1)
    row = connection.execute(query.with_for_update() if locked else query).one_or_none()
    if row is None:
        raise StorageError("the audit log has lost its head: somebody removed a row; nothing can be recorded until it is restored")
    return _head_of(row)


def _head_of(row: Any) -> Head:
    return Head(row.number, bytes(row.digest), row.at, bytes(row.signature))


def _head_row(head: Head) -> dict[str, Any]:
    return {"number": head.number, "digest": head.digest, "at": head.at, "signature": head.signature}


def _row(record: Record) -> dict[str, Any]:
    names = (
        "number",
        "id",
        "at",
        "organization",
        "project",
        "action",
        "target",
        "before",
        "after",
        "request_id",
        "previous",
        "digest",
    )
    actor = record.actor
    who = {"actor_kind": actor.kind, "actor_id": actor.id, "actor_email": actor.email, "actor_address": actor.address}
    return {name: getattr(record, name) for name in names} | who


def _record(row: Any) -> Record:
    facts = dict(row._mapping)
    actor = Actor(*(facts.pop(f"actor_{name}") for name in ("kind", "id", "email", "address")))
    return Record(**facts, actor=actor)


def _conditions(wanted: Wanted) -> Iterator[sa.ColumnElement[bool]]:
    log = audit_log.c
    if wanted.organization is not None:
        yield log.organization == wanted.organization
    many = (
        (log.project, wanted.projects),
        (log.action, wanted.actions),
        (log.actor_id, wanted.actors),
        (log.actor_email, wanted.emails),
        (log.target, wanted.targets),
    )
    yield from (column.in_(values) for column, values in many if values)
    if wanted.since is not None:
        yield log.at >= wanted.since
    if wanted.until is not None:
        yield log.at < wanted.until


def _number(connection: Connection, record_id: str, wanted: Wanted) -> int:
    query = sa.select(audit_log.c.number).where(audit_log.c.id == record_id)
    if wanted.organization is not None:
        query = query.where(audit_log.c.organization == wanted.organization)
    number = connection.scalar(query)
    if number is None:
        raise NotFound(f"There is no audit log {record_id[:64]!r}.", param="after")
    return int(number)


def _first(found: Iterator[Problem], most: int) -> Iterator[Problem]:
    for problem, _ in zip(found, range(most), strict=False):
        yield problem


def _cut(text: str | None, most: int) -> str | None:
    return _clean(text, most) if text is not None else None


def _clean(text: str, most: int) -> str:
    """Fit for a column and for a terminal: no keys, no control characters, no halves of characters, not too long."""
    return "".join(c if c.isprintable() else "?" for c in without_keys(text))[:most]


def keep_head(audit: Audit, path: Path) -> None:
    """Write the newest head into a file outside of the database; does nothing when it is there."""
    head = audit.head()
    if head.signature and head != read_head(path):
        private_directory(path.parent)
        write_private(path, json.dumps(chain.to_json(head)).encode())


def read_head(path: Path) -> Head | None:
    """What `keep_head` wrote. Raises StorageError for a file that it didn't."""
    try:
        return chain.head_of(json.loads(read_private(path)))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{path} holds no head of an audit log") from None
