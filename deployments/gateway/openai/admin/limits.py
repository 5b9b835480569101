"""Rate limits and model permissions of a project, as the OpenAI administration API has them. Pure translation.

A rate limit has the id `rl-MODEL`, or `rl-MODEL@KEY` for one key alone; `*` in the place of MODEL is the sum over all models. What
is not bounded reads `rate_limits.MOST`. Our own field is `max_concurrent_streams`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from cluster.errors import InvalidRequest, NotFound
from cluster.tenancy.model_permissions import EVERYTHING, MAX_MODELS, Mode, Permission
from cluster.tenancy.rate_limits import ANY, MOST, PREFIX, RateLimit
from deployments.gateway.openai.bounded import Bounded
from deployments.gateway.openai.types import parse

MAX_PAGE = 100
LARGEST = (1 << 63) - 1

FIELDS = {"max_requests_per_1_minute": "requests", "max_tokens_per_1_minute": "tokens", "max_concurrent_streams": "streams"}
UNSUPPORTED = (
    "max_images_per_1_minute",
    "max_audio_megabytes_per_1_minute",
    "max_requests_per_1_day",
    "batch_1_day_max_input_tokens",
)


class RateLimitUpdate(Bounded):
    max_requests_per_1_minute: int | None = Field(default=None, ge=0, le=LARGEST)
    max_tokens_per_1_minute: int | None = Field(default=None, ge=0, le=LARGEST)
    max_concurrent_streams: int | None = Field(default=None, ge=0, le=LARGEST)


class PermissionUpdate(Bounded):
    mode: Mode
    model_ids: list[str] = Field(max_length=MAX_MODELS)


class ProjectRateLimit(TypedDict):
    object: Literal["project.rate_limit"]
    id: str
    model: str
    max_requests_per_1_minute: int
    max_tokens_per_1_minute: int
    max_concurrent_streams: int


class RateLimitList(TypedDict):
    object: Literal["list"]
    data: list[ProjectRateLimit]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ProjectModelPermissions(TypedDict):
    object: Literal["project.model_permissions"]
    mode: Mode
    model_ids: list[str]


class PermissionsDeleted(TypedDict):
    object: Literal["project.model_permissions.deleted"]
    deleted: bool


def rate_limit(limit: RateLimit) -> ProjectRateLimit:
    return {
        "object": "project.rate_limit",
        "id": limit.id,
        "model": limit.model,
        "max_requests_per_1_minute": _said(limit.requests),
        "max_tokens_per_1_minute": _said(limit.tokens),
        "max_concurrent_streams": _said(limit.streams),
    }


def everything(project: str, rows: Iterable[RateLimit], served: Iterable[str]) -> dict[str, RateLimit]:
    """By id: the rows there are, the project's own, and one for each served model."""
    blank = [RateLimit(project), *(RateLimit(project, name) for name in served)]
    return {limit.id: limit for limit in [*blank, *rows]}


def found(limits: Mapping[str, RateLimit], project: str, limit_id: str) -> RateLimit:
    """The limit of that id. One of a key is there as soon as its model's is. Raises NotFound."""
    if limit_id in limits:
        return limits[limit_id]
    model, at, key_id = limit_id.removeprefix(PREFIX).partition("@")
    if at and key_id not in ("", ANY) and f"{PREFIX}{model}" in limits and limit_id.startswith(PREFIX):
        return RateLimit(project, model, key_id)
    raise NotFound("There is no such rate limit.", param="rate_limit_id")


def page(limits: Mapping[str, RateLimit], query: Mapping[str, str]) -> RateLimitList:
    """By id. Raises InvalidRequest."""
    ids = sorted(limits)
    most = _limit(query.get("limit", str(MAX_PAGE)))
    if (after := query.get("after")) is not None:
        ids = ids[_place(ids, after, "after") + 1 :]
    if (before := query.get("before")) is not None:
        ids = ids[: _place(ids, before, "before")]
        shown = ids[-most:] if after is None else ids[:most]
    else:
        shown = ids[:most]
    return {
        "object": "list",
        "data": [rate_limit(limits[limit_id]) for limit_id in shown],
        "first_id": shown[0] if shown else None,
        "last_id": shown[-1] if shown else None,
        "has_more": len(ids) > len(shown),
    }


def changed(limit: RateLimit, body: dict[str, Any]) -> RateLimit:
    """`limit` with what `body` says; fields that it doesn't name stay. Raises InvalidRequest."""
    for name in UNSUPPORTED:
        if body.get(name) is not None:
            raise InvalidRequest(f"{name} is not supported by this server.", param=name, code="unsupported_parameter")
    asked = parse(RateLimitUpdate, body)
    given: dict[str, Any] = {ours: getattr(asked, theirs) for theirs, ours in FIELDS.items()}
    said: dict[str, Any] = {name: value if value < MOST else None for name, value in given.items() if value is not None}
    return replace(limit, **said)


def permissions(permission: Permission | None) -> ProjectModelPermissions:
    said = permission or EVERYTHING
    return {"object": "project.model_permissions", "mode": said.mode, "model_ids": list(said.models)}


def _said(value: int | None) -> int:
    return MOST if value is None else value


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:4]) <= MAX_PAGE and len(text) <= 4):
        raise InvalidRequest(f"limit must be a number between 1 and {MAX_PAGE}.", param="limit")
    return int(text)


def _place(ids: list[str], limit_id: str, param: str) -> int:
    if limit_id not in ids:
        raise InvalidRequest(f"{param} is not the id of an item of this list.", param=param)
    return ids.index(limit_id)
