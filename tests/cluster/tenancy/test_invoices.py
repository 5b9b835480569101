from __future__ import annotations

import csv
import io
import json
from decimal import Decimal

import pytest

from cluster.errors import Conflict, InvalidRequest, NotFound, PlatformError
from cluster.store import Store
from cluster.tenancy import invoice_formats, money
from cluster.tenancy.credits import Credits
from cluster.tenancy.focus import COLUMNS, Focus
from cluster.tenancy.invoices import Invoice, Invoices
from cluster.tenancy.ledger import Ledger
from cluster.tenancy.metered import Metered
from cluster.tenancy.rating import PriceList
from cluster.tenancy.reconcile import problems
from tests.cluster.tenancy.accounts import caller
from tests.cluster.tenancy.conftest import Clock

PLAN = PriceList.model_validate(
    {
        "fee": "2",
        "minimum": "5",
        "charges": [
            {"meter": "input_tokens", "price": "0.15", "per": 1_000_000},
            {"meter": "output_tokens", "price": "0.60", "per": 1_000_000},
            {"meter": "requests", "window": "day", "tiers": [{"up_to": 2, "price": "0"}, {"price": "0.01"}]},
            {"meter": "compute_seconds", "model": "code", "price": "0.002"},
        ],
    }
)
DECEMBER = 1_796_083_200.0  # its first second of 2026, UTC


@pytest.fixture
def used(ledger: Ledger, clock: Clock) -> Ledger:
    """Seven requests of two projects and two models, on two days of November, the last one in the last second."""
    ledger.prices.publish("default", PLAN)
    for number in range(6):
        project, model = ("web", "chat") if number % 2 else ("api", "code")
        book(ledger, f"r{number}", project, model)
        clock.now += 86_400 * (number == 3)
    clock.now = DECEMBER - 0.5
    book(ledger, "last", "web", "chat")
    return ledger


def book(ledger: Ledger, request_id: str, project: str, model: str) -> None:
    ledger.reserve(caller(project, f"key-{project}"), request_id, model, 1_000_000)
    ledger.settle(request_id, Metered(input_tokens=1003, output_tokens=335, compute_seconds=1_234_567), "finished")


def test_a_month_is_invoiced_once_with_all_its_lines(used: Ledger, either_store: Store, clock: Clock) -> None:
    invoices = Invoices(either_store, clock)
    clock.now = DECEMBER
    made = invoices.issue("acme", "2026-11")
    assert invoices.issue("acme", "2026-11") == made == invoices.get("acme", "2026-11")
    assert invoices.list("acme") == [made]
    assert invoices.list("umbrella") == []
    amounts = {(line.project, line.model, line.meter): line.amount for line in made.lines}
    assert amounts["api", "code", "compute_seconds"] == round(3 * 1.234567 * 2000)
    assert sum(amount for (_, _, meter), amount in amounts.items() if meter == "input_tokens") == round(7 * 1003 * 0.15)
    assert sum(amount for (_, _, meter), amount in amounts.items() if meter == "requests") == 2 * 10_000
    assert amounts["", "", "fee"] == 2_000_000
    assert made.total == 5_000_000, "the minimum fills up what usage and fee come to"
    assert problems(either_store) == []


def test_what_is_booked_late_comes_into_the_next_month_whatever_the_clock_says(
    used: Ledger, either_store: Store, clock: Clock
) -> None:
    used.reserve(caller(), "late", "chat", 1_000_000)
    clock.now = DECEMBER + 5
    issued = Invoices(either_store, clock).issue("acme", "2026-11")
    clock.now = DECEMBER - 100
    used.settle("late", Metered(input_tokens=1_000_000), "finished")
    assert Invoices(either_store, clock).get("acme", "2026-11") == issued
    [line] = [line for line in Invoices(either_store, clock).draft("acme", "2026-12").lines if line.meter == "input_tokens"]
    assert line.amount == 150_000
    assert problems(either_store) == []


def test_a_month_that_has_not_ended_is_a_draft(used: Ledger, either_store: Store, clock: Clock) -> None:
    invoices = Invoices(either_store, clock)
    with pytest.raises(Conflict, match="not ended"):
        invoices.issue("acme", "2026-11")
    with pytest.raises(NotFound):
        invoices.get("acme", "2026-11")
    draft = invoices.draft("acme", "2026-11")
    assert draft.issued_at is None
    clock.now = DECEMBER
    assert invoices.issue("acme", "2026-11").lines == draft.lines


def test_credits_pay_first_what_expires_first_and_never_more_than_is_due(used: Ledger, either_store: Store, clock: Clock) -> None:
    credits, invoices = Credits(either_store, clock), Invoices(either_store, clock)
    for amount, reason, expires in ((3, "a", None), (1, "b", DECEMBER + 9e6), (4, "gone", DECEMBER - 0.1), (9, "d", None)):
        clock.now += 0.01
        credits.grant("acme", amount * money.MICRO, reason, expires)
    clock.now = DECEMBER
    made = invoices.issue("acme", "2026-11")
    assert [(used.reason, used.amount) for used in made.credits] == [("b", 1_000_000), ("a", 3_000_000), ("d", 1_000_000)]
    assert (made.subtotal, made.total) == (5_000_000, 0)
    assert {grant.reason: grant.left for grant in credits.list("acme")} == {"a": 0, "b": 0, "gone": 0, "d": 8_000_000}
    assert credits.list("umbrella") == []
    assert problems(either_store) == []


@pytest.mark.parametrize(
    ("amount", "reason", "expires"), [(0, "x", None), (-1, "x", None), (1, "", None), (1, "a\nb", None), (1, "x", 1.0)]
)
def test_what_is_no_credit_is_refused(either_store: Store, clock: Clock, amount: int, reason: str, expires: float | None) -> None:
    with pytest.raises(InvalidRequest):
        Credits(either_store, clock).grant("acme", amount, reason, expires)


def test_an_invoice_that_differs_from_the_usage_is_not_issued(used: Ledger, either_store: Store, clock: Clock) -> None:
    with either_store.begin() as connection:
        columns = "'forged', organization, 99, project, key_id, model, price, outcome, opened_at, booked_at, 7"
        meters = "requests, input_tokens, cached_tokens, output_tokens, replayed_tokens, compute_seconds, traded_volume, operation"
        connection.exec_driver_sql(
            f"INSERT INTO usage_records SELECT {columns}, {meters} FROM usage_records WHERE request_id = 'r1'"
        )
    clock.now = DECEMBER
    with pytest.raises(PlatformError, match="not invoiced"):
        Invoices(either_store, clock).issue("acme", "2026-11")


@pytest.fixture
def issued(used: Ledger, either_store: Store, clock: Clock) -> Invoice:
    Credits(either_store, clock).grant("acme", 1_500_000, "welcome =1+1")
    clock.now = DECEMBER
    return Invoices(either_store, clock).issue("acme", "2026-11")


def test_json_and_csv_add_up_to_the_total(issued: Invoice) -> None:
    tree = json.loads(json.dumps(invoice_formats.as_json(issued)))
    shown = sum(Decimal(line["amount"]) for line in [*tree["lines"], *tree["credits"]])
    rows = list(csv.DictReader(io.StringIO(invoice_formats.as_csv(issued))))
    assert shown == Decimal(tree["total"]) == sum(Decimal(row["amount"]) for row in rows) == money.decimal(issued.total)


def test_a_name_is_no_formula_in_a_spreadsheet(issued: Invoice) -> None:
    assert [invoice_formats._safe(text) for text in ("=1+1", "+1", "@x", "-1+1", "-1.50", "plain")] == [
        "'=1+1",
        "'+1",
        "'@x",
        "'-1+1",
        "-1.50",
        "plain",
    ]


def test_a_pdf_has_every_line_and_is_the_same_twice(issued: Invoice) -> None:
    made = invoice_formats.as_pdf(issued, "MMaaS at Ümläut — 北京")
    assert made.startswith(b"%PDF-")
    assert made == invoice_formats.as_pdf(issued, "MMaaS at Ümläut — 北京")
    assert len(made) > 1500


def test_focus_rows_add_up_and_obey_the_specification(issued: Invoice, either_store: Store) -> None:
    rows = list(csv.DictReader(io.StringIO(Focus(either_store, "MMaaS").csv(issued))))
    assert list(rows[0]) == sorted(COLUMNS) == list(COLUMNS)
    assert sum(Decimal(row["BilledCost"]) for row in rows) == money.decimal(issued.total)
    assert {row["ChargeCategory"] for row in rows} == {"Usage", "Purchase", "Credit"}
    assert len({row["ChargePeriodStart"] for row in rows if row["ChargeCategory"] == "Usage"}) == 3
    for row in rows:
        assert broken(row) == []


MANDATORY = (
    "BilledCost",
    "BillingAccountId",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "ChargeCategory",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "ContractedCost",
    "EffectiveCost",
    "InvoiceIssuerName",
    "ListCost",
    "ProviderName",
    "PublisherName",
    "ServiceCategory",
    "ServiceName",
    "ServiceSubcategory",
)
"""Columns that allow no null in any row (FOCUS 1.2)."""

OF_BOUGHT = ("ListUnitPrice", "ContractedUnitPrice", "PricingQuantity", "PricingUnit", "PricingCategory", "SkuId", "SkuPriceId")
"""Columns that allow none in rows of usage and purchases."""


def broken(row: dict[str, str]) -> list[str]:
    """What of the specification's rules for values a row doesn't keep."""
    found = [name for name in MANDATORY if not row[name]]
    if row["ChargeCategory"] in ("Usage", "Purchase"):
        found += [name for name in OF_BOUGHT if not row[name]]
        product = Decimal(row["PricingQuantity"] or 0) * Decimal(row["ListUnitPrice"] or 0)
        found += ["ListUnitPrice"] * (abs(product - Decimal(row["ListCost"])) > Decimal("1e-9"))
    found += ["ConsumedQuantity"] * (bool(row["ConsumedQuantity"]) != (row["ChargeCategory"] == "Usage"))
    found += ["ConsumedUnit"] * (bool(row["ConsumedUnit"]) != bool(row["ConsumedQuantity"]))
    found += ["ChargeFrequency"] * (row["ChargeCategory"] == "Purchase" and row["ChargeFrequency"] == "Usage-Based")
    found += ["Tags"] * (row["Tags"] != "" and not isinstance(json.loads(row["Tags"]), dict))
    found += ["period"] * (
        not row["BillingPeriodStart"] <= row["ChargePeriodStart"] < row["ChargePeriodEnd"] <= row["BillingPeriodEnd"]
    )
    return found + [name for name in row if name.endswith(("Cost", "Price", "Quantity")) and "E" in row[name].upper()]


def test_the_check_of_focus_rows_can_fail(issued: Invoice, either_store: Store) -> None:
    row = next(Focus(either_store, "MMaaS").rows(issued))
    assert broken(row) == []
    for change in ({"BilledCost": ""}, {"ListUnitPrice": "7"}, {"ConsumedQuantity": ""}, {"SkuId": ""}, {"ListCost": "1E-7"}):
        assert broken(row | change)
