"""Hard spend limits of an organization and its projects, as the OpenAI administration API has them.

A limit is a budget: what a call may cost at most is held against it before any work. The official API knows the month; `interval`
may be `day`, too. Answers also say what is spent and reserved, as decimal numbers.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from cluster.errors import NotFound
from cluster.tenancy import budgets, money
from cluster.tenancy.periods import Window
from deployments.gateway.openai.admin.acting import Act, Id
from deployments.gateway.openai.admin.projects import PROJECT
from deployments.gateway.openai.admin.spending import CENT, Cents, Currency, Place, check_currency
from deployments.gateway.openai.answers import ErrorResponse
from deployments.gateway.openai.bounded import Bounded
from deployments.gateway.responses import json_response
from deployments.gateway.routes import takes
from deployments.gateway.scopes import ScopedRoute, requires

router = APIRouter(route_class=ScopedRoute, tags=["administration"], responses={"default": {"model": ErrorResponse}})
OF_ORGANIZATION = "/v1/organization/spend_limit"
OF_PROJECT = f"{PROJECT}/spend_limit"
Interval = Annotated[Window, Query()]


class SpendLimitUpdate(Bounded):
    threshold_amount: Annotated[Cents, Field(ge=1)]
    currency: Currency
    interval: Window


class Enforcement(TypedDict):
    status: Literal["inactive", "enforcing"]


class SpendLimit(TypedDict):
    object: str
    threshold_amount: int
    currency: str
    interval: Window
    enforcement: Enforcement
    limit: str
    spent: str
    reserved: str


class SpendLimitDeleted(TypedDict):
    object: str
    deleted: bool


@router.get(OF_ORGANIZATION, response_model=SpendLimit)
@requires("billing.read")
def retrieve_spend_limit(request: Request, interval: Interval = "month") -> Response:
    act = Act.of(request)
    return json_response(_shown(act, Place.of(act, None), interval))


@router.post(OF_ORGANIZATION, response_model=SpendLimit, openapi_extra=takes(SpendLimitUpdate))
@requires("billing.write")
def update_spend_limit(request: Request) -> Response:
    """Set the most that the organization may spend. Calls that could pass it are refused before any work."""
    return _update(Act.of(request), None)


@router.delete(OF_ORGANIZATION, response_model=SpendLimitDeleted)
@requires("billing.write")
def delete_spend_limit(request: Request, interval: Interval = "month") -> Response:
    return _delete(Act.of(request), None, interval)


@router.get(OF_PROJECT, response_model=SpendLimit)
@requires("billing.read")
def retrieve_project_spend_limit(request: Request, project_id: Id, interval: Interval = "month") -> Response:
    act = Act.of(request)
    return json_response(_shown(act, Place.of(act, project_id), interval))


@router.post(OF_PROJECT, response_model=SpendLimit, openapi_extra=takes(SpendLimitUpdate))
@requires("billing.write")
def update_project_spend_limit(request: Request, project_id: Id) -> Response:
    """Set the most that the project may spend, within what its organization may."""
    return _update(Act.of(request), project_id)


@router.delete(OF_PROJECT, response_model=SpendLimitDeleted)
@requires("billing.write")
def delete_project_spend_limit(request: Request, project_id: Id, interval: Interval = "month") -> Response:
    return _delete(Act.of(request), project_id, interval)


def _update(act: Act, project_id: str | None) -> Response:
    place, asked = Place.of(act, project_id), act.form(SpendLimitUpdate)
    check_currency(act, asked.currency)
    act.accounts.budgets.set(place.kind, place.name, asked.interval, asked.threshold_amount * CENT)
    return act.done(place.event, place.name, _shown(act, place, asked.interval))


def _delete(act: Act, project_id: str | None, interval: Window) -> Response:
    place = Place.of(act, project_id)
    was_there = act.accounts.budgets.get(place.kind, place.name, interval) is not None
    act.accounts.budgets.set(place.kind, place.name, interval, None)
    return act.done(place.event, place.name, {"object": f"{place.kind}.spend_limit.deleted", "deleted": was_there})


def _shown(act: Act, place: Place, interval: Window) -> SpendLimit:
    """It is enforcing when a call that costs anything at all is refused. Raises NotFound."""
    limit = act.accounts.budgets.get(place.kind, place.name, interval)
    if limit is None:
        raise NotFound("There is no such spend limit.")
    balance = act.accounts.budgets.balance(place.kind, place.name, act.accounts.clock())
    return {
        "object": f"{place.kind}.spend_limit",
        "threshold_amount": limit.micro // CENT,
        "currency": act.accounts.prices.currency(),
        "interval": interval,
        "enforcement": {"status": "enforcing" if budgets.passed(balance, [limit], 1) else "inactive"},
        "limit": money.plain(limit.micro),
        "spent": money.plain(balance.spent_in(interval)),
        "reserved": money.plain(balance.held),
    }
