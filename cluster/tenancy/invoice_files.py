"""An invoice as a file of one of the formats that others read: JSON, CSV, PDF, and FOCUS for FinOps tools."""

from __future__ import annotations

import json
from typing import Literal

from cluster.store import Store
from cluster.tenancy import invoice_formats
from cluster.tenancy.focus import Focus
from cluster.tenancy.invoices import Invoice

Format = Literal["json", "csv", "pdf", "focus"]

ISSUER = "MMaaS"


class InvoiceFiles:
    """Reads the store only for FOCUS, which has a row for each day."""

    def __init__(self, store: Store, issuer: str = ISSUER) -> None:
        self._focus = Focus(store, issuer)
        self._issuer = issuer

    def written(self, invoice: Invoice, form: Format) -> bytes:
        match form:
            case "pdf":
                return invoice_formats.as_pdf(invoice, self._issuer)
            case "csv":
                return invoice_formats.as_csv(invoice).encode()
            case "focus":
                return self._focus.csv(invoice).encode()
        return (json.dumps(invoice_formats.as_json(invoice), indent=2, ensure_ascii=False) + "\n").encode()
