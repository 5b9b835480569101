"""API keys: made, verified, rotated, revoked.

Stored is HMAC-SHA256(pepper, secret): neither a copy of the database nor a look at it yields a key. The text of a key
(`key_text.py`) is returned once, when it is made, and is never logged or put into an error.

Two worlds: a *project key* belongs to a service account or a user of a project and calls models; an *admin key* belongs to an
organization, or to a user of it, and administers. A user's key does what its scopes and the user's roles both allow.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from cluster.errors import Conflict, InvalidRequest, NotFound, Unauthenticated
from cluster.store import Store
from cluster.tenancy import access, acts, paging, permissions, projects, service_accounts, users
from cluster.tenancy.acts import Note, Rows, unnoted
from cluster.tenancy.key_records import Key, api_keys, key_of, of_place, owned, owner_gone, split
from cluster.tenancy.key_text import parsed, written
from cluster.tenancy.paging import FIRST, Asked, Page
from cluster.types import Principal

logger = logging.getLogger(__name__)

LAST_USED_S = 60.0
"""How exact `last_used_at` is: a key in use writes no more often."""
OVERLAP_S = 86400.0
"""How long a rotated key still works, unless said otherwise."""
MAX_MODELS = 100
_MODEL = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._:/-]{0,127}\Z")
_NOBODYS = ("", secrets.token_bytes(32))
"""What an id before all others is compared with."""


class Keys:
    """The keys in the store. `pepper` is the platform's secret (`Secrets.pepper`)."""

    def __init__(self, store: Store, pepper: bytes, clock: Callable[[], float] = time.time, note: Note = unnoted) -> None:
        self._store = store
        self._pepper = pepper
        self._clock = clock
        self._note = note

    def create(
        self,
        project: str,
        name: str,
        scopes: Iterable[str] = (permissions.INFERENCE,),
        expires_at: float | None = None,
        *,
        models: Iterable[str] | None = None,
        service_account: str | None = None,
        user: str | None = None,
    ) -> tuple[str, str]:
        """Make a project's key; returns (id, text). The text can't be shown again.

        It belongs to the service account, or the user, of these ids; without either to a new service account of the key's name.
        Raises InvalidRequest for values out of range, NotFound for a project or owner, Conflict for an archived project.
        """
        granted = permissions.check(scopes, permissions.OF_PROJECT_KEYS, "scopes")
        row = self._row(name, granted, expires_at, models)
        with acts.begin(self._store, self._note) as begun:
            organization = projects.owner(begun.connection, project)
            rows = begun.at(organization)
            projects.find_live(rows.connection, organization, project)
            row |= {"organization_id": organization, "project_id": project, "user_id": user}
            if user is not None:
                if access.in_project(rows.connection, organization, project, user) is None:
                    raise NotFound("There is no such user.")
            elif service_account is not None:
                row["service_account_id"] = service_accounts.find(rows.connection, project, service_account).id
            else:
                row["service_account_id"] = service_accounts.insert(rows, project, name, self._clock()).id
            return self._insert(rows, row)

    def create_admin(
        self,
        organization: str,
        name: str,
        scopes: Iterable[str] = (permissions.EVERYTHING,),
        expires_at: float | None = None,
        *,
        user: str | None = None,
    ) -> tuple[str, str]:
        """Make an organization's admin key, as `create`. A user's is never wider than the user's roles."""
        row = self._row(name, permissions.check(scopes, permissions.OF_ADMIN_KEYS, "scopes"), expires_at, None)
        with acts.begin(self._store, self._note, organization) as rows:
            found = sa.select(projects.organizations.c.id).where(projects.organizations.c.id == organization)
            paging.only(rows.connection.scalar(found), "organization")
            if user is not None:
                users.find(rows.connection, organization, user)
            return self._insert(rows, {**row, "organization_id": organization, "user_id": user})

    def verify(self, text: str) -> Principal:
        """Who holds this key. Raises Unauthenticated when it is malformed, unknown, revoked or expired, or its owner is gone.

        An unknown id costs the same query, the reading of a row (that of the id before it) and the same comparison as a wrong
        secret, so that time does not tell which ids exist.
        """
        key_id, secret = parsed(text)
        nearest = sa.select(api_keys.c.id, api_keys.c.digest).where(api_keys.c.id <= key_id).order_by(api_keys.c.id.desc()).limit(1)
        with self._store.read() as connection:
            found_id, digest = connection.execute(nearest).one_or_none() or _NOBODYS
            if not hmac.compare_digest(key_id.encode() + self._digest(secret), found_id.encode() + bytes(digest)):
                raise Unauthenticated("the API key is not valid")
            row = connection.execute(owned().where(api_keys.c.id == key_id)).one()
            principal = self._principal(connection, row)
        if row.last_used_at is None or row.last_used_at + LAST_USED_S <= self._clock():
            self._used(key_id)
        return principal

    def get(self, organization: str, project: str | None, key_id: str) -> Key:
        """A project's key, or an admin key. Raises NotFound, also for one that was revoked."""
        with self._store.read() as connection:
            row = connection.execute(of_place(organization, project).where(api_keys.c.id == key_id)).one_or_none()
            return self._shown(paging.only(row, "key"))

    def page(self, organization: str, project: str | None, asked: Asked = FIRST, *, has_owner: bool | None = None) -> Page[Key]:
        """A project's keys or the organization's admin keys, without the revoked ones; `has_owner`: only those whose owner is
        still there (True) or isn't (False). Raises NotFound for the project."""
        query = of_place(organization, project)
        if has_owner is not None:
            gone = service_accounts.service_accounts.c.deleted_at.is_not(None) | users.users.c.deleted_at.is_not(None)
            gone |= projects.projects.c.archived_at.is_not(None)
            query = query.where(sa.not_(gone) if has_owner else gone)
        with self._store.read() as connection:
            if project is not None:
                projects.find(connection, organization, project)
            return paging.read(connection, query, (api_keys.c.created_at, api_keys.c.id), asked, self._shown)

    def list(self, project: str | None = None) -> list[Key]:
        """Every key by time of creation, revoked ones too; all or one project's."""
        query = owned().order_by(api_keys.c.created_at, api_keys.c.id)
        if project is not None:
            query = query.where(api_keys.c.project_id == project)
        with self._store.read() as connection:
            return [self._shown(row) for row in connection.execute(query)]

    def update(
        self,
        organization: str,
        project: str,
        key_id: str,
        *,
        scopes: Iterable[str] | None = None,
        expires_at: float | None = None,
        models: Iterable[str] | None = None,
    ) -> Key:
        """Change what is given. Raises InvalidRequest, and NotFound as `get`."""
        changes: dict[str, Any] = {}
        if scopes is not None:
            changes["scopes"] = _joined(permissions.check(scopes, permissions.OF_PROJECT_KEYS, "scopes"))
        if expires_at is not None:
            changes["expires_at"] = self._future(expires_at)
        if models is not None:
            changes["models"] = _joined(_checked_models(models))
        self.get(organization, project, key_id)
        if changes:
            with acts.begin(self._store, self._note, organization) as rows:
                rows.update("api_key.updated", api_keys, api_keys.c.id == key_id, changes)
        return self.get(organization, project, key_id)

    def rotate(self, key_id: str, overlap_s: float = OVERLAP_S) -> tuple[str, str]:
        """Make the successor of a key; returns its (id, text). Both work for `overlap_s`, then only the new one.

        The new key has the same owner, scopes, models and end. Raises NotFound, InvalidRequest for a negative overlap, and Conflict
        for a key that works no more or was rotated already.
        """
        if not 0 <= overlap_s <= 366 * 86400:
            raise InvalidRequest("The overlap is 0 to 366 days.", param="overlap_seconds")
        with acts.begin(self._store, self._note) as begun:
            same = api_keys.c.id == key_id
            old = begun.connection.execute(owned().where(same).with_for_update(of=api_keys)).one_or_none()
            if old is None:
                raise NotFound(f"there is no key {key_id!r}", param="key_id")
            if not self._shown(old).is_open or old.replaced_by is not None:
                raise Conflict("A key that works no more, or has a successor, can't be rotated.")
            kept = ("organization_id", "project_id", "service_account_id", "user_id", "name", "scopes", "models", "expires_at")
            rows = begun.at(old.organization_id)
            new_id, text = self._insert(rows, {column: getattr(old, column) for column in kept})
            end = self._clock() + overlap_s
            ends = end if old.expires_at is None else min(end, old.expires_at)
            rows.update("api_key.updated", api_keys, same, {"expires_at": ends, "replaced_by": new_id})
        return new_id, text

    def revoke(self, key_id: str) -> None:
        """End a key at once; doing it again changes nothing. Raises NotFound for an unknown id."""
        with acts.begin(self._store, self._note) as begun:
            same = api_keys.c.id == key_id
            organization = begun.connection.scalar(sa.select(api_keys.c.organization_id).where(same))
            if organization is None:
                raise NotFound(f"there is no key {key_id!r}", param="key_id")
            values = {"revoked_at": self._clock()}
            begun.at(organization).update("api_key.deleted", api_keys, same & api_keys.c.revoked_at.is_(None), values)

    def _row(self, name: str, scopes: frozenset[str], expires_at: float | None, models: Iterable[str] | None) -> dict[str, Any]:
        return {
            "name": paging.checked_name(name),
            "scopes": _joined(scopes),
            "models": None if models is None else _joined(_checked_models(models)),
            "expires_at": None if expires_at is None else self._future(expires_at),
        }

    def _future(self, expires_at: float) -> float:
        if not self._clock() < expires_at < 1e11:
            raise InvalidRequest("a key must expire in the future", param="expires_at")
        return expires_at

    def _insert(self, rows: Rows, row: dict[str, Any]) -> tuple[str, str]:
        key_id, secret = secrets.token_hex(6), secrets.token_hex(32)
        own = {"id": key_id, "digest": self._digest(secret), "created_at": self._clock()}
        rows.insert("api_key.created", api_keys, {**row, **own})
        return key_id, written(key_id, secret)

    def _principal(self, connection: Connection, row: Any) -> Principal:
        if row.revoked_at is not None or owner_gone(row):
            raise Unauthenticated("the API key was revoked")
        if row.expires_at is not None and row.expires_at <= self._clock():
            raise Unauthenticated("the API key has expired")
        scopes = permissions.expand(row.scopes.split())
        if row.user_id is not None:
            scopes &= _held(connection, row)
        return Principal(row.project_id or "", row.id, scopes, row.organization_id, split(row.models))

    def _used(self, key_id: str) -> None:
        """A store that can't be written now is no reason to turn a caller away."""
        now = self._clock()
        stale = api_keys.c.last_used_at.is_(None) | (api_keys.c.last_used_at <= now - LAST_USED_S)
        try:
            with self._store.begin() as connection:
                connection.execute(api_keys.update().where(api_keys.c.id == key_id, stale).values(last_used_at=now))
        except sa.exc.OperationalError:
            logger.warning("last use of a key was not written", extra={"key_id": key_id})

    def _shown(self, row: Any) -> Key:
        return key_of(row, self._clock())

    def _digest(self, secret: str) -> bytes:
        return hmac.digest(self._pepper, bytes.fromhex(secret), hashlib.sha256)


def _held(connection: Connection, row: Any) -> frozenset[str]:
    """Raises Unauthenticated for a user who left the project."""
    if row.project_id is None:
        return access.in_organization(connection, row.organization_id, row.user_id)
    held = access.in_project(connection, row.organization_id, row.project_id, row.user_id)
    if held is None:
        raise Unauthenticated("the API key was revoked")
    return held


def _checked_models(models: Iterable[str]) -> frozenset[str]:
    named = frozenset(models)
    if not (0 < len(named) <= MAX_MODELS and all(_MODEL.match(name) for name in named)):
        raise InvalidRequest(f"models are 1 to {MAX_MODELS} names of models.", param="models")
    return named


def _joined(words: Iterable[str]) -> str:
    return " ".join(sorted(words))
