"""`mmaas usage`: what was used in a month, and what it came to."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mmaas.commands.platform import JSON

if TYPE_CHECKING:
    from cluster.tenancy.usage_report import Sum

MONTH_HELP = "A month like 2026-11, in UTC."


class By(StrEnum):
    """What usage is summed by."""

    project = "project"
    key = "key"
    model = "model"
    user = "user"
    operation = "operation"
    outcome = "outcome"


_COLUMNS: dict[By, Literal["project", "key_id", "model", "user_id", "operation", "outcome"]] = {
    By.project: "project",
    By.key: "key_id",
    By.model: "model",
    By.user: "user_id",
    By.operation: "operation",
    By.outcome: "outcome",
}


def add_to(app: typer.Typer) -> None:
    app.command("usage")(usage)


def usage(
    month: Annotated[str | None, typer.Option(help=f"{MONTH_HELP} By default the one that runs.")] = None,
    by: Annotated[list[By] | None, typer.Option(help="Sum by this; repeat for several. By default project and model.")] = None,
    organization: Annotated[str | None, typer.Option(help="Only this organization's.")] = None,
    as_json: JSON = False,
) -> None:
    """Show tokens, requests and amounts of a month."""
    import time

    from cluster import settings
    from cluster.tenancy import periods, usage_report
    from mmaas.output import write_json
    from mmaas.up import opened_store

    number = periods.month_of(time.time()) if month is None else periods.parse_month(month)
    chosen = by or [By.project, By.model]
    asked = usage_report.Question(
        periods.month_start(number),
        periods.month_start(number + 1),
        by=[_COLUMNS[one] for one in chosen],
        organization=organization,
    )
    with opened_store(settings.load()) as store:
        found = usage_report.usage(store, asked)
    if as_json:
        write_json([_as_json(each) for each in found])
    else:
        _print(found, asked.by)


def _as_json(each: Sum) -> dict[str, object]:
    from dataclasses import asdict

    from cluster.tenancy import money

    return {**each.group, **asdict(each.metered), "amount": money.plain(each.amount)}


def _print(found: list[Sum], names: Sequence[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    from cluster.tenancy import money
    from mmaas.output import console

    table = Table(box=None, pad_edge=False)
    for heading in names:
        table.add_column(heading)
    for heading in ("requests", "input", "cached", "output", "compute s", "amount"):
        table.add_column(heading, justify="right")
    for each in found:
        used = each.metered
        counts = (used.requests, used.input_tokens, used.cached_tokens, used.output_tokens, round(used.compute_seconds / 1e6, 3))
        table.add_row(
            *(Text(each.group[name] or "") for name in names), *(f"{count:,}" for count in counts), money.plain(each.amount)
        )
    console().print(table)
