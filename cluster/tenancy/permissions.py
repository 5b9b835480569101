"""What may be permitted, and which roles come with the platform. Words only: who has which role is `access.py`.

A scope is a permission or a word for many. Two worlds never mix: permissions of a *project* are held by its keys, permissions of an
*organization* by admin keys. `admin` is to operate the platform itself, which is above every organization.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from cluster.errors import Forbidden, InvalidRequest

Level = Literal["organization", "project"]

INFERENCE = "inference"
EVERYTHING = "organization"
"""All that there is to do in one's own organization, whatever later versions add."""
OPERATE = "admin"
"""Metrics of all tenants, models asleep and awake; implies EVERYTHING."""

PROJECT = frozenset({INFERENCE, "annotate"})
READING = frozenset(
    f"{what}.read" for what in ["projects", "keys", "admin_keys", "users", "roles", "limits", "usage", "billing", "audit"]
)
WRITING = frozenset(f"{what}.write" for what in ["projects", "keys", "admin_keys", "users", "roles", "limits", "billing"])
ORGANIZATION = READING | WRITING

OF_PROJECT_KEYS = PROJECT
OF_ADMIN_KEYS = ORGANIZATION | {EVERYTHING, OPERATE}
ALL = OF_PROJECT_KEYS | OF_ADMIN_KEYS


def expand(scopes: Iterable[str]) -> frozenset[str]:
    """The scopes with all that they imply."""
    given = frozenset(scopes)
    if OPERATE in given:
        given |= {EVERYTHING}
    return given | ORGANIZATION if EVERYTHING in given else given


def words(level: Level) -> frozenset[str]:
    """The permissions that a role of this level may have."""
    return PROJECT if level == "project" else ORGANIZATION | {EVERYTHING}


def check(scopes: Iterable[str], allowed: frozenset[str], param: str) -> frozenset[str]:
    """The scopes as a set. Raises InvalidRequest when there are none, or others than the allowed ones."""
    asked = frozenset(scopes)
    if not asked or not asked <= allowed:
        named = ", ".join(sorted(word[:64] for word in asked - allowed)) or "none"
        raise InvalidRequest(f"{param} are one or more of {', '.join(sorted(allowed))}; got {named}", param=param)
    return asked


def may_grant(holder: frozenset[str], granted: Iterable[str]) -> None:
    """Nobody gives to others what they don't hold. Permissions of projects are free to give for whoever may write roles at all.
    Raises Forbidden."""
    if missing := expand(granted) - PROJECT - holder:
        raise Forbidden(f"You can't give or take what your own key doesn't hold: {', '.join(sorted(missing))}.")


@dataclass(frozen=True, slots=True)
class Predefined:
    """A role that every organization, or project, has and nobody can change."""

    level: Level
    name: str
    description: str
    permissions: frozenset[str]

    @property
    def id(self) -> str:
        return f"role_{self.level}_{self.name}"


_SEE = frozenset({"projects.read"})
_VIEW = _SEE | {"limits.read", "usage.read"}
_MONEY = frozenset({"billing.read", "billing.write"})
_NONE = frozenset[str]()

_OF_ORGANIZATIONS = (
    ("owner", "Everything in the organization.", frozenset({EVERYTHING})),
    ("admin", "Everything but admin keys and money.", ORGANIZATION - {"admin_keys.write", "billing.write"}),
    ("developer", "Sees projects, their keys, limits and usage.", _VIEW | {"keys.read"}),
    ("analyst", "Sees projects, limits and usage.", _VIEW),
    ("annotator", "Sees projects.", _SEE),
    ("auditor", "Sees everything, changes nothing.", READING),
    ("billing", "Usage, invoices and budgets.", _VIEW | _MONEY),
    ("reader", "Belongs to the organization; the rest comes from projects.", _SEE),
)
_OF_PROJECTS = (
    ("owner", "Everything in the project.", PROJECT),
    ("admin", "Everything in the project.", PROJECT),
    ("developer", "Calls models.", frozenset({INFERENCE})),
    ("analyst", "Calls models.", frozenset({INFERENCE})),
    ("annotator", "Labels data.", frozenset({"annotate"})),
    ("auditor", "Belongs to the project, and does nothing there.", _NONE),
    ("billing", "Belongs to the project, and does nothing there.", _NONE),
    ("member", "Calls models.", frozenset({INFERENCE})),
)
PREDEFINED: dict[str, Predefined] = {
    role.id: role
    for role in (
        *(Predefined("organization", *words) for words in _OF_ORGANIZATIONS),
        *(Predefined("project", *words) for words in _OF_PROJECTS),
    )
}
