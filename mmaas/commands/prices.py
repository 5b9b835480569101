"""`mmaas prices publish`, `list` and `subscribe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmaas.commands.platform import JSON

app = typer.Typer(help="Plans and their prices.", no_args_is_help=True)


@app.command()
def publish(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Prices as JSON; docs/accounts-ledger.md shows one.")],
    plan: Annotated[str, typer.Option(help="The plan whose new version this is.")] = "default",
    days: Annotated[float, typer.Option(min=0.0, help="Days until it takes effect; at once by default, never earlier.")] = 0.0,
) -> None:
    """Publish a version of a plan's prices. Requests from then on are priced by it, and none before."""
    import time

    from cluster.tenancy.periods import iso
    from cluster.tenancy.prices import parse
    from mmaas.commands import accounts
    from mmaas.output import console

    with accounts.opened() as opened:
        since = time.time() + days * 86_400 if days else None
        version = opened.prices.publish(plan, parse(file.read_text(encoding="utf-8")), since)
    console().print(f"Version {version.id} of {plan} counts from {iso(version.effective_at)} on", markup=False)


@app.command("list")
def list_prices(as_json: JSON = False) -> None:
    """Show all versions of all plans."""
    import json

    from cluster.tenancy.periods import iso
    from mmaas.commands import accounts
    from mmaas.output import console, write_json

    with accounts.opened() as opened:
        found = opened.prices.list()
    if as_json:
        whole = [(one.id, one.plan, one.effective_at, json.loads(one.prices.model_dump_json())) for one in found]
        write_json([dict(zip(("id", "plan", "effective_at", "prices"), each, strict=True)) for each in whole])
        return
    for one in found:
        meters = ", ".join(f"{charge.model} {charge.meter}" for charge in one.prices.charges)
        console().print(f"{one.id}  {one.plan}  from {iso(one.effective_at)}  {one.prices.currency}: {meters}", markup=False)


@app.command()
def subscribe(
    plan: Annotated[str, typer.Argument(help="A plan that has prices.")],
    organization: Annotated[str, typer.Option(help="Who changes to it, from now on.")] = "default",
) -> None:
    """Put an organization on a plan."""
    from mmaas.commands import accounts
    from mmaas.output import console

    with accounts.opened() as opened:
        opened.prices.subscribe(organization, plan)
    console().print(f"{organization} is on {plan}", markup=False)
