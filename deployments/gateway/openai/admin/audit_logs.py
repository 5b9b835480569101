"""GET /v1/organization/audit_logs as the OpenAI API has it: the query and the list.

Types that the published list doesn't have (denials of access, models, kept calls) are listed only when `event_types[]` names them,
or `*` for all: clients that check answers strictly know no others. `mmaas audit list` shows everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.errors import InvalidRequest
from cluster.tenancy.audit import Wanted
from cluster.tenancy.chain import Record
from deployments.gateway.openai.admin.audit_events import event
from deployments.gateway.openai.answers import AuditLogs

_KINDS = {
    "api_key": "created updated deleted",
    "group": "created updated deleted",
    "invite": "sent accepted deleted",
    "login": "succeeded failed",
    "logout": "succeeded failed",
    "organization": "updated",
    "project": "created updated archived deleted",
    "rate_limit": "updated deleted",
    "resource": "deleted",
    "role": "created updated deleted",
    "role.assignment": "created deleted",
    "service_account": "created updated deleted",
    "user": "added updated deleted",
}
PUBLISHED = frozenset(f"{kind}.{verb}" for kind, verbs in _KINDS.items() for verb in verbs.split())
"""Of the published types those that have a meaning here."""

MAX_LIMIT = 100
_TYPE = re.compile(r"\*|[a-z_]{1,40}(\.[a-z_]{1,40}){1,4}\Z")
_RANGE = re.compile(r"effective_at\[(gt|gte|lt|lte)\]\Z")
_LISTS = ("project_ids", "event_types", "actor_ids", "actor_emails", "resource_ids")


@dataclass(frozen=True, slots=True)
class Asked:
    wanted: Wanted
    limit: int = 20
    after: str | None = None
    before: str | None = None

    @classmethod
    def of(cls, query: Iterable[tuple[str, str]], organization: str) -> Asked:
        """From a query whose lists are written `name[]=a&name[]=b` or `name=a&name=b`. Raises InvalidRequest."""
        lists: dict[str, list[str]] = {name: [] for name in _LISTS}
        single, since, until = dict[str, str](), None, None
        for name, value in query:
            if name.removesuffix("[]") in lists:
                lists[name.removesuffix("[]")].append(value)
            elif match := _RANGE.match(name):
                seconds = _integer(name, value)
                if match[1] in ("gt", "gte"):
                    since = max(since or 0, seconds + (match[1] == "gt"))
                else:
                    until = min(until or 1 << 62, seconds + (match[1] == "lte"))
            else:
                single[name] = value
        wanted = Wanted(
            organization=organization,
            projects=lists["project_ids"],
            actions=_types(lists["event_types"]),
            actors=lists["actor_ids"],
            emails=lists["actor_emails"],
            targets=lists["resource_ids"],
            since=since,
            until=until,
        )
        limit = _integer("limit", single.get("limit", "20"))
        if not 1 <= limit <= MAX_LIMIT:
            raise InvalidRequest(f"limit is 1 to {MAX_LIMIT}, not {limit}", param="limit")
        return cls(wanted, limit, single.get("after"), single.get("before"))


def _types(named: Sequence[str]) -> Sequence[str]:
    if not named:
        return sorted(PUBLISHED)
    if any(_TYPE.match(name) is None for name in named):
        raise InvalidRequest("an event type reads like project.created", param="event_types")
    return [] if "*" in named else named


def _integer(name: str, value: str) -> int:
    if re.fullmatch(r"\d{1,15}", value, re.ASCII) is None:
        raise InvalidRequest(f"{name} is a whole number", param=name)
    return int(value)


def listing(records: Sequence[Record], has_more: bool) -> AuditLogs:
    data = [event(record) for record in records]
    ends = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": ends[0], "last_id": ends[1], "has_more": has_more}
