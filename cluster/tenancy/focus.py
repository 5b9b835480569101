"""Usage as FOCUS 1.2, the FinOps Open Cost and Usage Specification, so that it joins the bills of clouds in one table.

One row for each day, project, model, meter and version of prices, with all columns that the specification makes mandatory and
those of its conditional ones that fit a platform with plans and projects. An organization is the billing account, a project the sub
account. Monthly fees are rows of category Purchase, credits of category Credit. https://focus.finops.org
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal, localcontext

from cluster.store import Store
from cluster.tenancy import money, periods
from cluster.tenancy.invoice_formats import describe, written
from cluster.tenancy.invoices import Invoice, Line, line_of, sums
from cluster.tenancy.prices import Prices

VERSION = "1.2"

COLUMNS = (
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "ConsumedQuantity",
    "ConsumedUnit",
    "ContractedCost",
    "ContractedUnitPrice",
    "EffectiveCost",
    "InvoiceId",
    "InvoiceIssuerName",
    "ListCost",
    "ListUnitPrice",
    "PricingCategory",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "ResourceId",
    "ResourceName",
    "ResourceType",
    "ServiceCategory",
    "ServiceName",
    "ServiceSubcategory",
    "SkuId",
    "SkuMeter",
    "SkuPriceDetails",
    "SkuPriceId",
    "SubAccountId",
    "SubAccountName",
    "Tags",
)
"""In the specification's order, which is the alphabet's."""

Row = dict[str, str]
"""Every column; an empty text is null."""


class Focus:
    """Exports of one issuer, named in every row."""

    def __init__(self, store: Store, issuer: str) -> None:
        self._store = store
        self._issuer = issuer
        self._prices = Prices(store)

    def csv(self, invoice: Invoice) -> str:
        """An issued invoice or a draft, with the days of its usage."""
        return written([COLUMNS, *([row[column] for column in COLUMNS] for row in self.rows(invoice))])

    def rows(self, invoice: Invoice) -> Iterator[Row]:
        """Their billed costs add up to the invoice's total."""
        month = periods.parse_month(invoice.month)
        with self._store.read() as connection:
            found = sums(connection, invoice.organization, month, by_day=True)
            known = self._prices.bodies(connection, {row.price for row in found})
            daily = [(row.day, line_of(row, known[row.price])) for row in found]
        for day, line in daily:
            yield self._base(invoice, day * periods.DAY_S, (day + 1) * periods.DAY_S) | _usage(line)
        first, after = periods.month_start(month), periods.month_start(month + 1)
        for line in invoice.lines:
            if not line.model:
                yield self._base(invoice, first, after) | _monthly(line)
        for used in invoice.credits:
            what = {"ChargeCategory": "Credit", "ChargeFrequency": "One-Time", "ChargeDescription": f"credit: {used.reason}"}
            yield self._base(invoice, first, after) | _costs(-used.amount) | what

    def _base(self, invoice: Invoice, begins: float, ends: float) -> Row:
        month = periods.parse_month(invoice.month)
        return dict.fromkeys(COLUMNS, "") | {
            "BillingAccountId": invoice.organization,
            "BillingAccountName": invoice.organization,
            "BillingCurrency": invoice.currency,
            "BillingPeriodStart": periods.iso(periods.month_start(month)),
            "BillingPeriodEnd": periods.iso(periods.month_start(month + 1)),
            "ChargePeriodStart": periods.iso(begins),
            "ChargePeriodEnd": periods.iso(ends),
            "InvoiceId": invoice.id if invoice.issued_at is not None else "",
            "InvoiceIssuerName": self._issuer,
            "ProviderName": self._issuer,
            "PublisherName": self._issuer,
            "ServiceCategory": "AI and Machine Learning",
            "ServiceName": "Model serving",
            "ServiceSubcategory": "Generative AI",
        }


def _costs(amount: int) -> Row:
    return dict.fromkeys(("BilledCost", "EffectiveCost", "ListCost", "ContractedCost"), number(money.decimal(amount)))


def _usage(line: Line) -> Row:
    quantity = Decimal(line.quantity)
    return (
        _costs(line.amount)
        | _priced(line, quantity, f"{line.model}/{line.meter}")
        | {
            "ChargeCategory": "Usage",
            "ChargeFrequency": "Usage-Based",
            "ConsumedQuantity": number(quantity),
            "ConsumedUnit": line.unit,
            "ResourceId": f"models/{line.model}",
            "ResourceName": line.model,
            "ResourceType": "Model",
            "SubAccountId": line.project,
            "SubAccountName": line.project,
            "Tags": json.dumps({"mmaas/project": line.project}),
        }
    )


def _monthly(line: Line) -> Row:
    return (
        _costs(line.amount) | _priced(line, Decimal(1), line.meter) | {"ChargeCategory": "Purchase", "ChargeFrequency": "Recurring"}
    )


def _priced(line: Line, quantity: Decimal, sku: str) -> Row:
    """The unit price is what the row's units cost on the average: with tiers or packages no single price gives the cost, and the
    specification wants the product to match it. The plan's own price stands in SkuPriceDetails."""
    with localcontext() as context:
        context.prec = 40
        unit_price = number((money.decimal(line.amount) / quantity).quantize(Decimal("1e-20"))) if quantity else "0"
    details = {"x_PriceVersion": line.price} | (
        {"x_ListPrice": line.unit_price, "x_ListPricePer": line.per} if line.unit_price else {}
    )
    return {
        "ChargeDescription": describe(line),
        "PricingCategory": "Standard",
        "PricingQuantity": number(quantity),
        "PricingUnit": line.unit,
        "ListUnitPrice": unit_price,
        "ContractedUnitPrice": unit_price,
        "SkuId": sku,
        "SkuMeter": line.meter.replace("_", " "),
        "SkuPriceId": f"{sku}/{line.price}",
        "SkuPriceDetails": json.dumps(details),
    }


def number(value: Decimal) -> str:
    """Plain digits, without an exponent and without zeros that say nothing."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
