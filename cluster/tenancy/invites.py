"""Invitations: how a person comes into an organization.

Whoever invites gets a token once and hands it over; nothing is mailed. Accepting it with a name makes the user, with the role and
the projects that the invitation says. Stored is the token's SHA-256: it is 256 random bits, so there is nothing to guess.
It is written in hexadecimal digits: in base 64 one of 64 would begin with a dash, as an option of `mmaas users accept` does.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Column, Connection, Float, ForeignKey, Index, LargeBinary, String, Table, Text

from cluster.errors import Conflict, InvalidRequest, NotFound
from cluster.store import Store, metadata
from cluster.tenancy import acts, paging, projects, roles, users
from cluster.tenancy.acts import Note, unnoted
from cluster.tenancy.paging import FIRST, Asked, Page
from cluster.tenancy.users import User

LIFE_S = 7 * 86400.0
MAX_PROJECTS = 100

invites = Table(
    "invites",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("organization_id", String(63), ForeignKey("organizations.id", name="fk_invites_organization"), nullable=False),
    Column("email", String(250), nullable=False),
    Column("role_id", String(63), nullable=False),
    Column("projects", Text, nullable=False),  # a JSON object: role by id of project
    Column("digest", LargeBinary(32), nullable=False, unique=True),
    Column("created_at", Float(53), nullable=False),
    Column("expires_at", Float(53), nullable=False),
    Column("accepted_at", Float(53)),
    Index("ix_invites_organization_id_created_at", "organization_id", "created_at"),
)


@dataclass(frozen=True, slots=True)
class Invite:
    """`projects`: ids of roles by ids of projects."""

    id: str
    organization: str
    email: str
    role_id: str
    projects: Mapping[str, str]
    created_at: float
    expires_at: float
    accepted_at: float | None


class Invites:
    """The invitations in the store. Every verb raises NotFound for what isn't there or is another organization's."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time, note: Note = unnoted) -> None:
        self._store = store
        self._clock = clock
        self._note = note

    def create(self, organization: str, email: str, role: str, within: Mapping[str, str] | None = None) -> tuple[Invite, str]:
        """Invite somebody; returns the token, too. `within`: roles by projects to come into. Raises InvalidRequest, and Conflict
        for an archived project or for who belongs to the organization already."""
        address, token, now = users.checked_email(email), secrets.token_hex(32), self._clock()
        if len(within or {}) > MAX_PROJECTS:
            raise InvalidRequest(f"At most {MAX_PROJECTS} projects.", param="projects")
        with acts.begin(self._store, self._note, organization) as rows:
            role_id = roles.resolve(rows.connection, organization, None, role).id
            rights = {project: _right(rows.connection, organization, project, asked) for project, asked in (within or {}).items()}
            members = sa.select(users.users.c.id).where(users.users.c.organization_id == organization)
            if rows.connection.scalar(members.where(users.users.c.email == address, users.users.c.deleted_at.is_(None))):
                raise Conflict("A user with this address belongs to the organization already.")
            made = Invite(paging.new_id("invite"), organization, address, role_id, rights, now, now + LIFE_S, None)
            rows.insert("invite.sent", invites, _row(made, token))
        return made, token

    def get(self, organization: str, invite: str) -> Invite:
        with self._store.read() as connection:
            return _find(connection, organization, invite)

    def list(self, organization: str, asked: Asked = FIRST) -> Page[Invite]:
        query = sa.select(invites).where(invites.c.organization_id == organization)
        with self._store.read() as connection:
            return paging.read(connection, query, (invites.c.created_at, invites.c.id), asked, _invite)

    def delete(self, organization: str, invite: str) -> None:
        """Raises Conflict for one that was accepted."""
        with acts.begin(self._store, self._note, organization) as rows:
            if _find(rows.connection, organization, invite).accepted_at is not None:
                raise Conflict("The invitation was accepted: remove the user instead.")
            rows.delete("invite.deleted", invites, invites.c.id == invite)

    def accept(self, token: str, name: str) -> User:
        """Come in. Raises NotFound for a token that is unknown, used or out of date; projects archived since are left out."""
        now = self._clock()
        is_valid = (invites.c.accepted_at.is_(None)) & (invites.c.expires_at > now) & (invites.c.digest == _digest(token))
        with acts.begin(self._store, self._note) as begun:
            row = begun.connection.execute(sa.select(invites).where(is_valid).with_for_update()).one_or_none()
            if row is None:
                raise NotFound("The invitation is unknown, used or out of date.", param="token")
            invite, rows = _invite(row), begun.at(row.organization_id)
            user = users.insert(rows, invite.organization, invite.email, name, invite.role_id, now)
            for project, role in invite.projects.items():
                if projects.find(rows.connection, invite.organization, project).archived_at is None:
                    users.enter(rows, project, user.id, role, now)
            rows.update("invite.accepted", invites, invites.c.id == invite.id, {"accepted_at": now})
        return user


def _right(connection: Connection, organization: str, project: str, role: str) -> str:
    projects.find_live(connection, organization, project)
    return roles.resolve(connection, organization, project, role).id


def _find(connection: Connection, organization: str, invite: str) -> Invite:
    query = sa.select(invites).where(invites.c.organization_id == organization, invites.c.id == invite)
    return _invite(paging.only(connection.execute(query).one_or_none(), "invitation"))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _row(made: Invite, token: str) -> dict[str, Any]:
    return {
        "id": made.id,
        "organization_id": made.organization,
        "email": made.email,
        "role_id": made.role_id,
        "projects": json.dumps(dict(made.projects)),
        "digest": _digest(token),
        "created_at": made.created_at,
        "expires_at": made.expires_at,
    }


def _invite(row: Any) -> Invite:
    rights = json.loads(row.projects)
    return Invite(row.id, row.organization_id, row.email, row.role_id, rights, row.created_at, row.expires_at, row.accepted_at)
