"""Records of the audit log as the events of the OpenAI API: which published fields a type has, made of rows before and after. Pure.

Rows are those of the tables in `cluster/tenancy/`; one too long to be recorded in full (`redaction.facts`) gives no fields. What
was before and after stands beside them as it was recorded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from cluster.tenancy.chain import Actor, Record
from deployments.gateway.openai.admin.answers import role_name
from deployments.gateway.openai.admin.limits import FIELDS
from deployments.gateway.openai.answers import AuditLog

Row = Mapping[str, Any]


def event(record: Record) -> AuditLog:
    shown: dict[str, Any] = {
        "id": record.id,
        "type": record.action,
        "effective_at": int(record.at),
        "actor": _actor(record.actor),
        record.action: _details(record),
    }
    if record.project:
        shown["project"] = {"id": record.project}
    return shown  # type: ignore[return-value]


def _actor(actor: Actor) -> dict[str, object]:
    user = {name: value for name, value in (("id", actor.id), ("email", actor.email)) if value is not None}
    if actor.kind == "api_key":
        owner = {"type": "user", "user": {"email": actor.email}} if actor.email else {"type": "service_account"}
        return {"type": "api_key", "api_key": {"id": actor.id, **owner}}
    session: dict[str, object] = {"user": user}
    if actor.address:
        session["ip_address"] = actor.address
    return {"type": "session", "session": session}


def _details(record: Record) -> dict[str, Any]:
    before, after = (json.loads(text) if text else None for text in (record.before, record.after))
    full = {name: value for name, value in (("before", before), ("after", after)) if value is not None}
    if record.action == "login.failed":
        return {"error_code": (after or {}).get("code"), "error_message": f"refused at {record.target}", **full}
    return {"id": record.target, **_published(record.action, before, after), **full}


def _published(action: str, before: Row | None, after: Row | None) -> dict[str, Any]:
    kind, _, verb = action.rpartition(".")
    if kind == "role.assignment":
        return _assignment(after or before or {})
    if kind == "role":
        return _role(verb, before or {}, after or {})
    if kind not in _FIELDS or verb not in ("created", "sent", "added", "updated"):
        return {}
    was, now = (_filled(_FIELDS[kind](row or {})) for row in (before, after))
    if verb == "updated":
        return {"changes_requested": {name: value for name, value in now.items() if was.get(name) != value}}
    return {"data": now}


def _role(verb: str, before: Row, after: Row) -> dict[str, Any]:
    was, now = (set(row.get("permissions", "").split()) for row in (before, after))
    about = _filled({"resource_id": after.get("project_id") or after.get("organization_id")})
    about |= {"resource_type": f"api.{'project' if after.get('project_id') else 'organization'}"}
    if verb == "created":
        return _filled({"role_name": after.get("name"), "permissions": sorted(now)}) | about
    if verb != "updated":
        return {}
    new = {theirs: after.get(ours) for theirs, ours in (("role_name", "name"), ("description", "description"))}
    given = {"permissions_added": sorted(now - was), "permissions_removed": sorted(was - now)}
    return {"changes_requested": _filled(new) | given | about}


def _assignment(row: Row) -> dict[str, Any]:
    where = {"resource_id": row.get("project_id") or None, "resource_type": "project" if row.get("project_id") else "organization"}
    return _filled({"principal_id": row.get("holder_id"), "principal_type": row.get("kind"), **where})


def _filled(fields: Row) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _named(row: Row) -> str | None:
    return role_name(row["role_id"]) if "role_id" in row else None


_FIELDS: dict[str, Callable[[Row], Row]] = {
    "api_key": lambda row: {"scopes": row["scopes"].split() if "scopes" in row else None},
    "group": lambda row: {"group_name": row.get("name")},
    "invite": lambda row: {"email": row.get("email"), "role": _named(row)},
    "project": lambda row: {"name": row.get("name"), "title": row.get("name")},
    "rate_limit": lambda row: {theirs: row.get(ours) for theirs, ours in FIELDS.items()},
    "service_account": lambda row: {"role": row.get("role")},
    "user": lambda row: {"role": _named(row)},
}
"""Of the payload that made or changed a thing: the published names of its columns."""
