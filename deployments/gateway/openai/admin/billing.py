"""Invoices and prices of an organization, to be read. Not in the official API.

An invoice comes as JSON, CSV, PDF or FOCUS, by `format` or by the Accept header. Its id may also be a month that is not closed yet,
like 2026-11: then it is a draft.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from cluster.errors import NotFound
from cluster.tenancy import money, paging
from cluster.tenancy.invoice_files import Format
from cluster.tenancy.invoices import Invoice
from cluster.tenancy.prices import PriceVersion
from deployments.gateway.openai.admin import answers, objects
from deployments.gateway.openai.admin.acting import Act, Id, Paged
from deployments.gateway.openai.answers import ErrorResponse
from deployments.gateway.responses import json_response
from deployments.gateway.scopes import ScopedRoute, requires

router = APIRouter(route_class=ScopedRoute, tags=["administration"], responses={"default": {"model": ErrorResponse}})
INVOICES = "/v1/organization/invoices"

TYPES: Mapping[Format, str] = {
    "json": "application/json",
    "csv": "text/csv",
    "pdf": "application/pdf",
    "focus": "application/vnd.focus+csv",
}
_MONTH = re.compile(r"20[0-9][0-9]-(0[1-9]|1[0-2])\Z")
_FILES: dict[int | str, dict[str, Any]] = {200: {"content": {kind: {} for kind in list(TYPES.values())[1:]}}}


class InvoiceHead(TypedDict):
    object: Literal["invoice"]
    id: str
    month: str
    currency: str
    issued_at: int | None
    subtotal: str
    total: str


class ShownPrices(TypedDict):
    object: Literal["price_version"]
    id: str
    plan: str
    effective_at: int
    in_force: bool
    prices: dict[str, Any]


@router.get(INVOICES, response_model=objects.Cursor[InvoiceHead])
@requires("billing.read")
def list_invoices(request: Request, asked: Paged) -> Response:
    """The invoices that were issued, by month."""
    act = Act.of(request)
    found = paging.sliced(act.accounts.invoices.list(act.organization), lambda invoice: invoice.id, asked)
    return json_response(answers.cursor(found, _head))


@router.get(f"{INVOICES}/{{invoice_id}}", response_model=dict[str, Any], responses=_FILES)
@requires("billing.read")
def retrieve_invoice(request: Request, invoice_id: Id, format: Format | None = None) -> Response:
    """An invoice with its lines, or the draft of a month."""
    act = Act.of(request)
    invoice, form = _found(act, invoice_id), format or preferred(request.headers.get("accept", ""))
    suffix = "csv" if form == "focus" else form
    headers = {} if form == "json" else {"content-disposition": f'attachment; filename="{invoice.id}.{suffix}"'}
    return Response(act.accounts.invoice_files.written(invoice, form), media_type=TYPES[form], headers=headers)


@router.get("/v1/organization/prices", response_model=objects.Cursor[ShownPrices])
@requires("billing.read")
def list_prices(request: Request, asked: Paged) -> Response:
    """Every version of the organization's plan: those that were, the one in force and those that are announced."""
    act = Act.of(request)
    in_force = act.accounts.prices.at(act.organization).id
    found = paging.sliced(act.accounts.prices.of(act.organization), lambda version: str(version.id), asked)
    return json_response(answers.cursor(found, lambda version: _prices(version, in_force)))


def preferred(accept: str) -> Format:
    """The form that an Accept header likes most of those there are; JSON if it says nothing of them."""
    liked: list[tuple[float, Format]] = [(0.0, "json")]
    for part in accept.lower().split(","):
        kind, *more = (word.strip() for word in part.split(";"))
        weight = next((word[2:] for word in more if word.startswith("q=")), "1")
        liked += [(_weight(weight), form) for form in get_args(Format) if TYPES[form] == kind]
    return max(liked, key=lambda each: each[0])[1]


def _weight(text: str) -> float:
    return float(text) if re.fullmatch(r"[01](\.[0-9]{1,3})?", text) else 0.0


def _found(act: Act, invoice_id: str) -> Invoice:
    """Raises NotFound."""
    month = invoice_id.removeprefix("INV-").removesuffix(f"-{act.organization}")
    if _MONTH.match(month) is None:
        raise NotFound("There is no such invoice.")
    known = act.accounts.invoices
    return known.current(act.organization, month) if month == invoice_id else known.get(act.organization, month)


def _head(invoice: Invoice) -> InvoiceHead:
    return {
        "object": "invoice",
        "id": invoice.id,
        "month": invoice.month,
        "currency": invoice.currency,
        "issued_at": None if invoice.issued_at is None else int(invoice.issued_at),
        "subtotal": money.plain(invoice.subtotal),
        "total": money.plain(invoice.total),
    }


def _prices(version: PriceVersion, in_force: int) -> ShownPrices:
    return {
        "object": "price_version",
        "id": str(version.id),
        "plan": version.plan,
        "effective_at": int(version.effective_at),
        "in_force": version.id == in_force,
        "prices": json.loads(version.prices.model_dump_json()),
    }
