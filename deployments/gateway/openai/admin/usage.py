"""Usage and costs of an organization over HTTP, as the OpenAI administration API asks for them: a page for every kind."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import StringConstraints
from starlette.requests import Request
from starlette.responses import Response

from cluster.errors import InvalidRequest
from cluster.tenancy.usage_report import By, Question
from deployments.gateway.openai.admin.acting import Act
from deployments.gateway.openai.admin.buckets import BOUNDS_OF_COSTS, Buckets, UsagePage, Width
from deployments.gateway.openai.admin.usage_kinds import COST_GROUPS, KINDS, OURS, Kind, Shown, cost
from deployments.gateway.openai.answers import ErrorResponse
from deployments.gateway.responses import json_response
from deployments.gateway.scopes import ScopedRoute, requires

router = APIRouter(route_class=ScopedRoute, tags=["administration"], responses={"default": {"model": ErrorResponse}})

LATEST = 253_402_300_799  # the last second of the year 9999
Second = Annotated[int, Query(ge=0, le=LATEST)]
Words = Annotated[list[Annotated[str, StringConstraints(max_length=140)]] | None, Query(max_length=100)]


@dataclass(frozen=True, slots=True)
class Asked:
    """A question's time, and the words of its filters and groups, by the names that the query has for them."""

    start: int
    end: int
    width: Width
    limit: int | None
    page: str | None
    groups: Sequence[str]
    filters: Mapping[str, Sequence[str]]

    def question(self, act: Act, buckets: Buckets, by: Sequence[By], only: Mapping[By, Sequence[str]]) -> Question:
        ends = buckets.edges[-1][1]
        return Question(buckets.start, ends, buckets.width, by, act.organization, {**self.only, **only})

    @property
    def only(self) -> Mapping[By, Sequence[str]]:
        """What can't be a name is nobody's."""
        return {OURS[name]: [word for word in words if word.isprintable()] for name, words in self.filters.items()}

    def grouped(self, allowed: Sequence[str]) -> list[By]:
        """Raises InvalidRequest for groups that there are none of here."""
        if unknown := [name for name in self.groups if name not in allowed]:
            raise InvalidRequest(f"group_by is of {', '.join(allowed)}, not {unknown[0][:40]!r}.", param="group_by")
        return [OURS[name] for name in dict.fromkeys(self.groups) if name in OURS]


async def _asked(
    request: Request,
    start_time: Second,
    end_time: Second | None = None,
    limit: Annotated[int | None, Query(ge=1, le=1440)] = None,
    page: Annotated[str | None, Query(max_length=40)] = None,
    project_ids: Words = None,
    api_key_ids: Words = None,
    group_by: Words = None,
) -> Asked:
    """Lists may be written with brackets behind their names, as the official clients do, or without."""
    named = {"project_id": project_ids, "api_key_id": api_key_ids}
    filters = {name: words for name, plain in named.items() if (words := _both(request, f"{name}s", plain))}
    end = int(time.time()) + 1 if end_time is None else end_time
    return Asked(start_time, end, "1d", limit, page, _both(request, "group_by", group_by), filters)


def _both(request: Request, name: str, plain: list[str] | None) -> list[str]:
    bracketed = request.query_params.getlist(f"{name}[]")
    if len(bracketed) > 100:
        raise InvalidRequest(f"{name} has at most 100 items.", param=name)
    return [*(plain or ()), *bracketed]


async def _asked_of_usage(
    request: Request,
    asked: Annotated[Asked, Depends(_asked)],
    bucket_width: Width = "1d",
    user_ids: Words = None,
    models: Words = None,
    batch: bool | None = None,
) -> Asked:
    """There are no batch jobs: asked for them alone, nothing is found."""
    named = {"user_id": _both(request, "user_ids", user_ids), "model": _both(request, "models", models)}
    filters = {**asked.filters, **{name: words for name, words in named.items() if words}}
    if batch:
        filters["model"] = []
    return Asked(asked.start, asked.end, bucket_width, asked.limit, asked.page, asked.groups, filters)


async def _asked_of_costs(
    request: Request, asked: Annotated[Asked, Depends(_asked)], bucket_width: Literal["1d"] = "1d", line_items: Words = None
) -> Asked:
    lines = _both(request, "line_items", line_items)
    filters = {**asked.filters, "line_item": lines} if lines else asked.filters
    return Asked(asked.start, asked.end, bucket_width, asked.limit, asked.page, asked.groups, filters)


def usage_page(act: Act, kind: Kind, asked: Asked) -> UsagePage:
    buckets = Buckets.of(asked.start, asked.end, asked.width, asked.limit, asked.page)
    by = asked.grouped((*kind.groups, *(kind.more_groups or ())))
    results: dict[int, list[Shown]] = {}
    if kind.operation is not None:
        for found in act.accounts.usage(asked.question(act, buckets, by, {"operation": [kind.operation]})):
            results.setdefault(found.begins, []).append(kind.result(found, asked.groups))
    return buckets.page(results)


def _endpoint(kind: Kind) -> Callable[..., Response]:
    def usage(request: Request, asked: Annotated[Asked, Depends(_asked_of_usage)]) -> Response:
        return json_response(usage_page(Act.of(request), kind, asked))

    usage.__name__ = f"usage_{kind.path}"
    usage.__doc__ = f"Usage of {kind.path.replace('_', ' ')} by time{'' if kind.operation else ': there is none on this platform'}."
    return requires("usage.read")(usage)


for _kind in KINDS:
    router.add_api_route(f"/v1/organization/usage/{_kind.path}", _endpoint(_kind), response_model=UsagePage)


@router.get("/v1/organization/costs", response_model=UsagePage)
@requires("usage.read")
def costs(request: Request, asked: Annotated[Asked, Depends(_asked_of_costs)]) -> Response:
    """What usage came to by day, in the currency of the prices; a month's fee, minimum and credits stand on its invoice."""
    act = Act.of(request)
    buckets = Buckets.of(asked.start, asked.end, asked.width, asked.limit, asked.page, BOUNDS_OF_COSTS)
    by = asked.grouped(COST_GROUPS)
    currency, results = act.accounts.prices.currency().lower(), dict[int, list[Shown]]()
    for found in act.accounts.costs(asked.question(act, buckets, by, {})):
        results.setdefault(found.begins, []).append(cost(found, currency))
    return json_response(buckets.page(results))
