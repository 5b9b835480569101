"""API keys: made, verified, revoked.

A key reads `mk_` + 12 hexadecimal digits of id + 64 of secret (256 bits) + 8 of CRC32 over all before. The checksum lets a scanner
tell a leaked key from noise without asking us. Stored is HMAC-SHA256(pepper, secret): neither a copy of the database nor a look at
it yields a key. The text of a key is returned once, by `create`, and is never logged or put into an error.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import sqlalchemy as sa

from cluster.errors import InvalidRequest, NotFound, Unauthenticated
from cluster.store import Store, api_keys
from cluster.types import NAME, Principal

SCOPES = frozenset({"inference", "admin"})
_TEXT = re.compile(r"(mk_([0-9a-f]{12})([0-9a-f]{64}))([0-9a-f]{8})")
_UNKNOWN_DIGEST = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True)
class Key:
    """What may be shown of a key. Times are seconds since the epoch."""

    id: str
    tenant: str
    name: str
    scopes: frozenset[str]
    created_at: float
    expires_at: float | None
    revoked_at: float | None


class Keys:
    """The keys in the store. `pepper` is the platform's secret (`Secrets.pepper`)."""

    def __init__(self, store: Store, pepper: bytes, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._pepper = pepper
        self._clock = clock

    def create(self, tenant: str, name: str, scopes: Iterable[str], expires_at: float | None = None) -> tuple[str, str]:
        """Make a key; returns (id, text). The text can't be shown again. Raises InvalidRequest for values out of range."""
        granted = frozenset(scopes)
        self._check(tenant, name, granted, expires_at)
        key_id, secret = secrets.token_hex(6), secrets.token_hex(32)
        row = {
            "id": key_id,
            "tenant": tenant,
            "name": name,
            "digest": self._digest(secret),
            "scopes": " ".join(sorted(granted)),
            "created_at": self._clock(),
            "expires_at": expires_at,
        }
        with self._store.begin() as connection:
            connection.execute(api_keys.insert().values(row))
        return key_id, _text(key_id, secret)

    def verify(self, text: str) -> Principal:
        """Who holds this key. Raises Unauthenticated when it is malformed, unknown, revoked or expired.

        An unknown id costs the same comparison as a wrong secret, so that time does not tell which ids exist.
        """
        key_id, secret = _parse(text)
        with self._store.read() as connection:
            row = connection.execute(sa.select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
        matches = hmac.compare_digest(self._digest(secret), row.digest if row else _UNKNOWN_DIGEST)
        if row is None or not matches:
            raise Unauthenticated("the API key is not valid")
        if row.revoked_at is not None:
            raise Unauthenticated("the API key was revoked")
        if row.expires_at is not None and row.expires_at <= self._clock():
            raise Unauthenticated("the API key has expired")
        return Principal(row.tenant, row.id, frozenset(row.scopes.split()))

    def revoke(self, key_id: str) -> None:
        """End a key at once; doing it again changes nothing. Raises NotFound for an unknown id."""
        with self._store.begin() as connection:
            same = api_keys.c.id == key_id
            if connection.scalar(sa.select(api_keys.c.id).where(same)) is None:
                raise NotFound(f"there is no key {key_id!r}", param="key_id")
            connection.execute(api_keys.update().where(same, api_keys.c.revoked_at.is_(None)).values(revoked_at=self._clock()))

    def list(self, tenant: str | None = None) -> list[Key]:
        """Keys by time of creation, all or one tenant's."""
        query = sa.select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
        if tenant is not None:
            query = query.where(api_keys.c.tenant == tenant)
        with self._store.read() as connection:
            rows = connection.execute(query).all()
        return [Key(r.id, r.tenant, r.name, frozenset(r.scopes.split()), r.created_at, r.expires_at, r.revoked_at) for r in rows]

    def _check(self, tenant: str, name: str, scopes: frozenset[str], expires_at: float | None) -> None:
        if NAME.match(tenant) is None:
            raise InvalidRequest(f"{tenant!r} is not a tenant's name (lower case, digits, '.', '_', '-')", param="tenant")
        if not (0 < len(name) <= 100 and name.isprintable()):
            raise InvalidRequest("a key's name is 1 to 100 printable characters", param="name")
        if not scopes or not scopes <= SCOPES:
            asked = ", ".join(sorted(scopes)) or "none"
            raise InvalidRequest(f"scopes are one or more of {', '.join(sorted(SCOPES))}; got {asked}", param="scopes")
        if expires_at is not None and not expires_at > self._clock():
            raise InvalidRequest("a key must expire in the future", param="expires_at")

    def _digest(self, secret: str) -> bytes:
        return hmac.digest(self._pepper, bytes.fromhex(secret), hashlib.sha256)


def _text(key_id: str, secret: str) -> str:
    body = f"mk_{key_id}{secret}"
    return f"{body}{zlib.crc32(body.encode()):08x}"


def _parse(text: str) -> tuple[str, str]:
    match = _TEXT.fullmatch(text)
    if match is None or zlib.crc32(match[1].encode()) != int(match[4], 16):
        raise Unauthenticated("the API key is malformed: check that it was copied whole")
    return match[2], match[3]
