"""`mmaas invoice show`, `issue`, `list`, `credit` and `check`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mmaas.commands.platform import JSON
from mmaas.commands.usage import MONTH_HELP

if TYPE_CHECKING:
    from cluster.store import Store
    from cluster.tenancy.invoices import Invoice

app = typer.Typer(help="Invoices, credits, and whether the books are right.", no_args_is_help=True)

Organization = Annotated[str, typer.Option(help="Whose.")]


class Format(StrEnum):
    """How an invoice is written."""

    table = "table"
    json = "json"
    csv = "csv"
    pdf = "pdf"
    focus = "focus"


_FILES: dict[Format, Literal["json", "csv", "pdf", "focus"]] = {
    Format.json: "json",
    Format.csv: "csv",
    Format.pdf: "pdf",
    Format.focus: "focus",
}


@app.command()
def show(
    month: Annotated[str, typer.Argument(help=MONTH_HELP)],
    organization: Organization = "default",
    form: Annotated[Format, typer.Option("--format", help="focus: CSV by day for FinOps tools (FOCUS 1.2).")] = Format.table,
    output: Annotated[Path | None, typer.Option(help="A file instead of the terminal; a PDF needs one.")] = None,
) -> None:
    """Show an invoice, or what a month has come to so far."""
    from cluster.errors import InvalidRequest
    from cluster.tenancy.invoice_files import InvoiceFiles
    from cluster.tenancy.invoices import Invoices

    if form is Format.pdf and output is None:
        raise InvalidRequest("a PDF goes into a file: --output invoice.pdf", param="output")
    with _store() as store:
        invoice = Invoices(store).current(organization, month)
        written = b"" if form is Format.table else InvoiceFiles(store).written(invoice, _FILES[form])
    if output is not None and form is not Format.table:
        output.write_bytes(written)
    elif form is Format.table:
        _print(invoice)
    else:
        typer.echo(written.decode(), nl=False)


@app.command()
def issue(month: Annotated[str, typer.Argument(help=MONTH_HELP)], organization: Organization = "default") -> None:
    """Close a month that has ended and issue its invoice, once."""
    from mmaas.commands import accounts

    with accounts.opened() as opened:
        _print(opened.invoices.issue(organization, month))


@app.command("list")
def list_invoices(
    organization: Annotated[str | None, typer.Option(help="Only this organization's.")] = None, as_json: JSON = False
) -> None:
    """Show the invoices that were issued."""
    from cluster.tenancy import money
    from cluster.tenancy.invoices import Invoices
    from mmaas.output import console, write_json

    with _store() as store:
        found = Invoices(store).list(organization)
    if as_json:
        write_json(
            [{"id": one.id, "organization": one.organization, "month": one.month, "total": money.plain(one.total)} for one in found]
        )
        return
    for one in found:
        console().print(f"{one.id}  {money.plain(one.total)} {one.currency}", markup=False)


@app.command()
def credit(
    amount: Annotated[str, typer.Argument(help="Like 12.50, in the currency of the prices.")],
    reason: Annotated[str, typer.Option(help="What it is for; it stands on the invoice.")],
    organization: Organization = "default",
    days: Annotated[float | None, typer.Option(min=0.0, help="Days until it expires; never by default.")] = None,
) -> None:
    """Grant a credit, which the next invoices use up."""
    import time

    from cluster.tenancy import money
    from mmaas.commands import accounts
    from mmaas.output import console

    with accounts.opened() as opened:
        expires = None if days is None else time.time() + days * 86_400
        made = opened.credits.grant(organization, money.parse(amount), reason, expires)
    console().print(f"Granted {money.plain(made.amount)} to {organization}: {made.id}", markup=False)


@app.command()
def check() -> None:
    """Compare all that the ledger keeps twice, price every request again, and say what is wrong."""
    from cluster.tenancy.reconcile import problems
    from mmaas.output import console

    with _store() as store:
        found = problems(store)
    for problem in found:
        console(stderr=True).print(problem, markup=False, style="red")
    if found:
        raise typer.Exit(1)
    console().print("The books are right: entries sum to zero, nothing is missing, and every price comes out again.")


@contextlib.contextmanager
def _store() -> Iterator[Store]:
    from cluster import settings
    from mmaas.up import opened_store

    with opened_store(settings.load()) as store:
        yield store


def _print(invoice: Invoice) -> None:
    from rich.table import Table
    from rich.text import Text

    from cluster.tenancy import money
    from cluster.tenancy.invoice_formats import describe
    from mmaas.output import console

    table = Table(box=None, pad_edge=False, title=f"{invoice.id}{'' if invoice.issued_at else ' (draft)'}", title_justify="left")
    for heading in ("project", "for"):
        table.add_column(heading)
    for heading in ("quantity", f"amount ({invoice.currency})"):
        table.add_column(heading, justify="right")
    for line in invoice.lines:
        table.add_row(Text(line.project), Text(describe(line)), line.quantity, money.plain(line.amount))
    for used in invoice.credits:
        table.add_row("", Text(f"credit: {used.reason}"), "", money.plain(-used.amount))
    table.add_row("", "total", "", money.plain(invoice.total), style="bold")
    console().print(table)
