"""Spend alerts of an organization and its projects, as the OpenAI administration API has them.

The official API knows the month; `interval` may be `day`, too. Answers also say when an alert was passed last, how much had been
spent by then, and whether a mail about it was sent: without an SMTP server in the settings there is none, and this is the place to
look.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from cluster.tenancy import money, paging
from cluster.tenancy.paging import MOST, Asked
from cluster.tenancy.periods import Window
from cluster.tenancy.spend_alerts import Passed, SpendAlert, Wish
from deployments.gateway.openai.admin import answers, objects
from deployments.gateway.openai.admin.acting import Act, Id
from deployments.gateway.openai.admin.projects import PROJECT
from deployments.gateway.openai.admin.spending import CENT, Cents, Currency, Place, check_currency
from deployments.gateway.openai.answers import ErrorResponse
from deployments.gateway.openai.bounded import Bounded
from deployments.gateway.responses import json_response
from deployments.gateway.routes import takes
from deployments.gateway.scopes import ScopedRoute, requires

router = APIRouter(route_class=ScopedRoute, tags=["administration"], responses={"default": {"model": ErrorResponse}})
OF_ORGANIZATION = "/v1/organization/spend_alerts"
OF_PROJECT = f"{PROJECT}/spend_alerts"


class Channel(Bounded):
    type: Literal["email"]
    recipients: Annotated[list[Annotated[str, Field(max_length=320)]], Field(min_length=1, max_length=100)]
    subject_prefix: Annotated[str, Field(max_length=200)] | None = None


class SpendAlertForm(Bounded):
    threshold_amount: Annotated[Cents, Field(ge=0)]
    currency: Currency
    interval: Window
    notification_channel: Channel


class ShownChannel(TypedDict):
    type: Literal["email"]
    recipients: list[str]
    subject_prefix: str | None


class ShownPassed(TypedDict):
    passed_at: int
    spent: str
    mailed_at: int | None


class ShownAlert(TypedDict):
    id: str
    object: str
    threshold_amount: int
    currency: str
    interval: Window
    notification_channel: ShownChannel
    last_passed: ShownPassed | None


def _paged(
    limit: Annotated[int, Query(ge=0, le=MOST)] = 20,
    order: Literal["asc", "desc"] = "asc",
    after: Annotated[str | None, Query(max_length=63)] = None,
    before: Annotated[str | None, Query(max_length=63)] = None,
) -> tuple[Asked, str | None]:
    return Asked(limit, after, order), before


Paged = Annotated[tuple[Asked, str | None], Depends(_paged)]


@router.get(OF_ORGANIZATION, response_model=objects.Cursor[ShownAlert])
@requires("billing.read")
def list_spend_alerts(request: Request, asked: Paged) -> Response:
    return _list(Act.of(request), None, asked)


@router.post(OF_ORGANIZATION, response_model=ShownAlert, openapi_extra=takes(SpendAlertForm))
@requires("billing.write")
def create_spend_alert(request: Request) -> Response:
    """Tell these addresses, once a month or day, when the organization has spent so much."""
    return _create(Act.of(request), None)


@router.get(f"{OF_ORGANIZATION}/{{alert_id}}", response_model=ShownAlert)
@requires("billing.read")
def retrieve_spend_alert(request: Request, alert_id: Id) -> Response:
    return _retrieve(Act.of(request), None, alert_id)


@router.post(f"{OF_ORGANIZATION}/{{alert_id}}", response_model=ShownAlert, openapi_extra=takes(SpendAlertForm))
@requires("billing.write")
def update_spend_alert(request: Request, alert_id: Id) -> Response:
    """With another threshold it can be passed again in the same month or day."""
    return _update(Act.of(request), None, alert_id)


@router.delete(f"{OF_ORGANIZATION}/{{alert_id}}", response_model=objects.Deleted)
@requires("billing.write")
def delete_spend_alert(request: Request, alert_id: Id) -> Response:
    return _delete(Act.of(request), None, alert_id)


@router.get(OF_PROJECT, response_model=objects.Cursor[ShownAlert])
@requires("billing.read")
def list_project_spend_alerts(request: Request, project_id: Id, asked: Paged) -> Response:
    return _list(Act.of(request), project_id, asked)


@router.post(OF_PROJECT, response_model=ShownAlert, openapi_extra=takes(SpendAlertForm))
@requires("billing.write")
def create_project_spend_alert(request: Request, project_id: Id) -> Response:
    """Tell these addresses, once a month or day, when the project has spent so much."""
    return _create(Act.of(request), project_id)


@router.get(f"{OF_PROJECT}/{{alert_id}}", response_model=ShownAlert)
@requires("billing.read")
def retrieve_project_spend_alert(request: Request, project_id: Id, alert_id: Id) -> Response:
    return _retrieve(Act.of(request), project_id, alert_id)


@router.post(f"{OF_PROJECT}/{{alert_id}}", response_model=ShownAlert, openapi_extra=takes(SpendAlertForm))
@requires("billing.write")
def update_project_spend_alert(request: Request, project_id: Id, alert_id: Id) -> Response:
    """With another threshold it can be passed again in the same month or day."""
    return _update(Act.of(request), project_id, alert_id)


@router.delete(f"{OF_PROJECT}/{{alert_id}}", response_model=objects.Deleted)
@requires("billing.write")
def delete_project_spend_alert(request: Request, project_id: Id, alert_id: Id) -> Response:
    return _delete(Act.of(request), project_id, alert_id)


def _list(act: Act, project_id: str | None, asked: tuple[Asked, str | None]) -> Response:
    place, (page, before) = Place.of(act, project_id), asked
    found = paging.sliced(act.accounts.spend_alerts.list(place.scope), lambda alert: alert.id, page, before)
    passed, currency = act.accounts.spend_alerts.passed([alert.id for alert in found.items]), act.accounts.prices.currency()
    return json_response(answers.cursor(found, lambda alert: _alert(place, alert, passed.get(alert.id), currency)))


def _create(act: Act, project_id: str | None) -> Response:
    place = Place.of(act, project_id)
    return _done(act, place, act.accounts.spend_alerts.create(act.organization, place.scope, _wish(act)))


def _retrieve(act: Act, project_id: str | None, alert_id: str) -> Response:
    place = Place.of(act, project_id)
    return json_response(_shown(act, place, act.accounts.spend_alerts.get(place.scope, alert_id)))


def _update(act: Act, project_id: str | None, alert_id: str) -> Response:
    place = Place.of(act, project_id)
    act.accounts.spend_alerts.get(place.scope, alert_id)
    return _done(act, place, act.accounts.spend_alerts.update(place.scope, alert_id, _wish(act)))


def _delete(act: Act, project_id: str | None, alert_id: str) -> Response:
    place = Place.of(act, project_id)
    act.accounts.spend_alerts.delete(place.scope, alert_id)
    return act.done(place.event, place.name, answers.deleted(f"{place.kind}.spend_alert", alert_id))


def _done(act: Act, place: Place, made: SpendAlert) -> Response:
    return act.done(place.event, place.name, _shown(act, place, made))


def _wish(act: Act) -> Wish:
    asked = act.form(SpendAlertForm)
    check_currency(act, asked.currency)
    channel = asked.notification_channel
    return Wish(asked.threshold_amount * CENT, asked.interval, tuple(channel.recipients), channel.subject_prefix)


def _shown(act: Act, place: Place, alert: SpendAlert) -> ShownAlert:
    passed = act.accounts.spend_alerts.passed([alert.id]).get(alert.id)
    return _alert(place, alert, passed, act.accounts.prices.currency())


def _alert(place: Place, alert: SpendAlert, passed: Passed | None, currency: str) -> ShownAlert:
    wish = alert.wish
    return {
        "id": alert.id,
        "object": f"{place.kind}.spend_alert",
        "threshold_amount": wish.threshold // CENT,
        "currency": currency,
        "interval": wish.period,
        "notification_channel": {
            "type": "email",
            "recipients": list(wish.recipients),
            "subject_prefix": wish.subject_prefix,
        },
        "last_passed": None if passed is None else _passed(passed),
    }


def _passed(passed: Passed) -> ShownPassed:
    mailed = None if passed.mailed_at is None else int(passed.mailed_at)
    return {"passed_at": int(passed.passed_at), "spent": money.plain(passed.spent), "mailed_at": mailed}
