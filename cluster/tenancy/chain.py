"""The chain of the audit log: records, each with the digest of the one before it, and signed statements of how far it reached.

Pure: what makes a log true, without knowing where it is kept. Whoever can write the database can write records and digests, but
not the signature of a head, so a changed, removed, reordered or inserted record is found by anybody who has the public key. An
older state as a whole (records and their head put back together) is found by a head that was kept elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

START = bytes(32)
"""What the first record follows."""


@dataclass(frozen=True, slots=True)
class Actor:
    """Who did it: a key of the API, a person at the platform's own machine (`session`), or the platform itself."""

    kind: Literal["api_key", "session", "system"]
    id: str  # a key's id, never its text; an operating system's user; a part of the platform
    email: str | None = None
    address: str | None = None  # from where


@dataclass(frozen=True, slots=True)
class Record:
    """One act or denial. `before` and `after` are JSON texts without secrets; `at` is seconds since the epoch."""

    number: int  # 1, 2, 3 … over the whole installation, without gaps
    id: str
    at: float
    organization: str
    project: str | None
    actor: Actor
    action: str
    target: str | None
    before: str | None
    after: str | None
    request_id: str | None
    previous: bytes
    digest: bytes = b""

    def computed(self) -> bytes:
        """SHA-256 over everything but `digest` itself."""
        actor = self.actor
        facts = [
            *(self.number, self.id, self.at, self.organization, self.project),
            *(actor.kind, actor.id, actor.email, actor.address),
            *(self.action, self.target, self.before, self.after, self.request_id, self.previous.hex()),
        ]
        return hashlib.sha256(b"mmaas-audit-record-1\n" + _json(facts)).digest()


@dataclass(frozen=True, slots=True)
class Head:
    """How far the chain reached at `at`: a signed statement, worth keeping elsewhere."""

    number: int
    digest: bytes
    at: float
    signature: bytes = b""

    @property
    def statement(self) -> bytes:
        return b"mmaas-audit-head-1\n" + _json([self.number, self.digest.hex(), self.at])

    def signed(self, key: Ed25519PrivateKey) -> Head:
        return Head(self.number, self.digest, self.at, key.sign(self.statement))

    def is_signed_by(self, key: Ed25519PublicKey) -> bool:
        try:
            key.verify(self.signature, self.statement)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with the chain at a record (or where one should be)."""

    number: int
    what: str


def problems(records: Iterable[Record], heads: Iterable[Head], key: Ed25519PublicKey) -> Iterator[Problem]:
    """Everything that is wrong with the whole chain from its first record on, given `heads` that must all lie on it.

    Holds one record at a time. What comes after the last head is proved by its digests alone.
    """
    marks: dict[int, set[bytes]] = {}
    for head in heads:
        if not head.is_signed_by(key):
            yield Problem(head.number, "the signature of the checkpoint is not this platform's")
        marks.setdefault(head.number, set()).add(head.digest)
    last, previous = 0, START
    for record in records:
        yield from _wrong(record, last, previous)
        if marks.pop(record.number, {record.digest}) != {record.digest}:
            yield Problem(record.number, "a checkpoint that covers the record says otherwise")
        last, previous = record.number, record.digest
    if marks.pop(0, {START}) != {START}:
        yield Problem(0, "a checkpoint of the empty log has another digest")
    for number in sorted(marks):
        yield Problem(number, f"a checkpoint covers this record, but the log has {_missing(number, last)}")


def _wrong(record: Record, last: int, previous: bytes) -> Iterator[Problem]:
    if record.number != last + 1:
        missing = record.number - last - 1
        yield Problem(record.number, f"{missing} missing before this record" if missing > 0 else "the record is out of order")
    if record.previous != previous:
        yield Problem(record.number, "the record does not follow the one before it")
    if record.computed() != record.digest:
        yield Problem(record.number, "the record was changed")


def _missing(number: int, last: int) -> str:
    return f"only {last} records: the rest was cut off" if number > last else "none of that number"


def to_json(thing: Record | Head) -> dict[str, Any]:
    """Plain JSON; bytes in hexadecimal."""
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in asdict(thing).items()}


def record_of(plain: dict[str, Any]) -> Record:
    """Raises TypeError, ValueError or KeyError for what `to_json` didn't write."""
    rest = {name: value for name, value in plain.items() if name not in ("actor", "previous", "digest")}
    return Record(
        **rest, actor=Actor(**plain["actor"]), previous=bytes.fromhex(plain["previous"]), digest=bytes.fromhex(plain["digest"])
    )


def head_of(plain: dict[str, Any]) -> Head:
    """Raises TypeError, ValueError or KeyError for what `to_json` didn't write."""
    return Head(int(plain["number"]), bytes.fromhex(plain["digest"]), float(plain["at"]), bytes.fromhex(plain["signature"]))


def _json(facts: list[Any]) -> bytes:
    return json.dumps(facts, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
