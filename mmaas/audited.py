"""The audit log as the command line uses it: who sits here, acts with their records, files to keep elsewhere."""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cluster.errors import InvalidRequest
from cluster.private_files import Secrets
from cluster.settings import Settings
from cluster.store import Store
from cluster.tenancy import chain
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.acts import Note
from cluster.tenancy.audit import MAX_PROBLEMS, Audit, read_head
from cluster.tenancy.chain import Actor, Head, Problem, Record


def audit_of(store: Store, settings: Settings) -> Audit:
    return Audit(store, Secrets(settings.home).audit_key)


def person() -> Actor:
    """Who types: the user of the operating system, and where from if that is known."""
    return Actor(
        "session", f"{getpass.getuser()}@{os.uname().nodename}", address=os.environ.get("SSH_CLIENT", "").partition(" ")[0] or None
    )


def accounts_of(store: Store, settings: Settings) -> Accounts:
    """What the person who types changes of them is recorded."""
    return Accounts(store, Secrets(settings.home).pepper, audit=audit_of(store, settings)).by(person())


def noting(store: Store, settings: Settings) -> Note:
    """Records acts of the person who types, in the transactions that do them."""
    return audit_of(store, settings).by(person())


def kept_heads(settings: Settings) -> Sequence[Head]:
    """What was kept outside of the database."""
    head = read_head(settings.home / "audit" / "head.json")
    return [head] if head else []


def public_key(text: str) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
    except ValueError:
        raise InvalidRequest("a public key is 64 hexadecimal digits", param="public_key") from None


def export(audit: Audit, path: Path) -> int:
    """Write records and checkpoints, one JSON object a line; returns how many records. Raises InvalidRequest if `path` exists."""
    head = audit.head()
    heads = [*(mark for mark in audit.checkpoints() if mark.number < head.number), *([head] if head.signature else [])]
    many = 0
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            for record in audit.records(upto=head.number):
                file.write(json.dumps({"record": chain.to_json(record)}) + "\n")
                many += 1
            for mark in heads:
                file.write(json.dumps({"checkpoint": chain.to_json(mark)}) + "\n")
    except FileExistsError:
        raise InvalidRequest(f"{path} exists already", param="file") from None
    return many


def verify_file(path: Path, key: Ed25519PublicKey) -> tuple[int, Sequence[Problem]]:
    """Prove an exported log without any database; returns the number of records and what is wrong."""
    heads = [chain.head_of(line["checkpoint"]) for line in _lines(path) if "checkpoint" in line]
    many = sum("record" in line for line in _lines(path))
    problems = [problem for problem, _ in zip(chain.problems(_records(path), heads, key), range(MAX_PROBLEMS), strict=False)]
    if many and not any(head.number == many for head in heads):
        problems.append(Problem(many, "no checkpoint covers the last record: the rest may have been cut off"))
    return many, problems


def _records(path: Path) -> Iterator[Record]:
    yield from (chain.record_of(line["record"]) for line in _lines(path) if "record" in line)


def _lines(path: Path) -> Iterator[dict[str, dict[str, object]]]:
    try:
        with path.open(encoding="ascii") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} is no exported audit log: {error}", param="file") from None
