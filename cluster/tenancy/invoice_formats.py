"""An invoice as JSON, as CSV and as a PDF for people. Shows what it is given and computes nothing but sums."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from decimal import Decimal

from cluster.tenancy import money, periods
from cluster.tenancy.invoices import Invoice, Line

COLUMNS = ("invoice", "project", "description", "quantity", "unit", "unit_price", "per", "amount", "currency")


def describe(line: Line) -> str:
    what = line.meter.replace("_", " ")
    return f"{line.model}: {what}" if line.model else f"monthly {what}"


def as_json(invoice: Invoice) -> dict[str, object]:
    """Amounts are decimal numbers as text, as everywhere outside."""
    return {
        "object": "invoice",
        "id": invoice.id,
        "organization": invoice.organization,
        "month": invoice.month,
        "currency": invoice.currency,
        "issued_at": None if invoice.issued_at is None else int(invoice.issued_at),
        "lines": [dict(zip(COLUMNS[1:8], _cells(line), strict=True)) | {"price_version": line.price} for line in invoice.lines],
        "credits": [{"grant": used.grant, "reason": used.reason, "amount": money.plain(-used.amount)} for used in invoice.credits],
        "subtotal": money.plain(invoice.subtotal),
        "total": money.plain(invoice.total),
    }


def as_csv(invoice: Invoice) -> str:
    """One row for each line and each credit; the amounts add up to the total."""
    rows = [(invoice.id, *map(_safe, _cells(line)), invoice.currency) for line in invoice.lines]
    for used in invoice.credits:
        rows.append((invoice.id, "", _safe(f"credit: {used.reason}"), "", "", "", "", money.plain(-used.amount), invoice.currency))
    return written([COLUMNS, *rows])


def _cells(line: Line) -> tuple[str, ...]:
    per = str(line.per) if line.unit_price is not None else ""
    return line.project, describe(line), line.quantity, line.unit, line.unit_price or "", per, money.plain(line.amount)


def _safe(text: str) -> str:
    """A name that spreadsheets would take for a formula is text to them, too."""
    return f"'{text}" if text[:1] in "=+@\t\r" or (text[:1] == "-" and not _is_number(text)) else text


def _is_number(text: str) -> bool:
    return text[1:].replace(".", "", 1).isdigit()


def written(rows: Sequence[Sequence[str]]) -> str:
    """RFC 4180."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return text.getvalue()


def as_pdf(invoice: Invoice, issuer: str) -> bytes:
    """One A4 page or more. The same invoice gives the same bytes."""
    from datetime import UTC, datetime

    from fpdf import FPDF

    page = FPDF()
    page.set_creation_date(datetime.fromtimestamp(invoice.issued_at or 0, UTC))
    page.set_title(_latin(invoice.id))
    page.set_margin(18)
    page.add_page()
    page.set_font("Helvetica", "B", 16)
    draft = " (draft)" if invoice.issued_at is None else ""
    page.cell(text=_latin(f"Invoice {invoice.id}{draft}"), new_x="LMARGIN", new_y="NEXT")
    page.set_font("Helvetica", "", 10)
    issued = "" if invoice.issued_at is None else f"Issued {periods.iso(invoice.issued_at)[:10]}"
    for text in (f"From {issuer}", f"To {invoice.organization}", f"For {invoice.month}", issued, ""):
        page.cell(h=6, text=_latin(text) or " ", new_x="LMARGIN", new_y="NEXT")
    page.set_font("Helvetica", "", 8)
    with page.table(col_widths=(18, 40, 20, 12, 20, 20), text_align=("LEFT", "LEFT", "RIGHT", "LEFT", "RIGHT", "RIGHT")) as table:
        for cells in _rows(invoice):
            table.row([_latin(cell) for cell in cells])
    return bytes(page.output())


def _rows(invoice: Invoice) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("Project", "For", "Quantity", "Unit", "Price", f"Amount ({invoice.currency})")]
    for line in invoice.lines:
        per = f" / {line.per:,}" if line.per > 1 else ""
        price = "in tiers" if line.unit_price is None else f"{line.unit_price}{per}"
        rows.append((line.project, describe(line), f"{Decimal(line.quantity):,}", line.unit, price, money.plain(line.amount)))
    rows += [("", f"Credit: {used.reason}", "", "", "", money.plain(-used.amount)) for used in invoice.credits]
    return [*rows, ("", "Total", "", "", "", money.plain(invoice.total))]


def _latin(text: str) -> str:
    """The PDF's built-in fonts hold Latin-1; other characters become question marks."""
    return text.encode("latin-1", "replace").decode("latin-1")
