"""`mmaas budgets set` and `list`; `mmaas budgets alert`, `alerts` and `forget`."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from mmaas.commands.platform import JSON

if TYPE_CHECKING:
    from cluster.tenancy.accounts import Accounts

app = typer.Typer(help="The most that may be spent, and who hears of how much was.", no_args_is_help=True)


class Kind(StrEnum):
    """Whose budget."""

    organization = "organization"
    project = "project"
    key = "key"


class Period(StrEnum):
    """For how long."""

    day = "day"
    month = "month"
    total = "total"


class Place(StrEnum):
    """Whose spending an alert is about."""

    organization = "organization"
    project = "project"


class Window(StrEnum):
    """In what time."""

    day = "day"
    month = "month"


@app.command("set")
def set_budget(
    amount: Annotated[str, typer.Argument(help="Like 12.50, in the currency of the prices; `none` takes the limit away.")],
    kind: Annotated[Kind, typer.Option(help="Whose.")] = Kind.project,
    name: Annotated[str, typer.Option(help="The organization's or project's name, or the key's id.")] = "default",
    period: Annotated[Period, typer.Option(help="For a day, for a month (both in UTC), or ever.")] = Period.month,
) -> None:
    """Limit what may be spent. Calls that could pass it are refused before any work."""
    from cluster.tenancy import money
    from mmaas.commands import accounts
    from mmaas.output import console

    with accounts.opened() as opened:
        opened.budgets.set(kind.value, name, period.value, None if amount == "none" else money.parse(amount))
    console().print(f"{kind.value} {name}, {period.value}: {amount}", markup=False)


@app.command("list")
def list_budgets(as_json: JSON = False) -> None:
    """Show the limits, with what is spent and reserved."""
    import time

    from cluster.tenancy import money
    from mmaas.commands import accounts
    from mmaas.output import console, write_json

    rows = []
    with accounts.opened() as opened:
        known = opened.budgets
        for limit in known.list():
            kind, _, name = limit.scope.partition(":")
            balance = known.balance(Kind(kind).value, name, time.time())
            amounts = (limit.micro, balance.spent_in(limit.period), balance.held)
            rows.append((kind, name, limit.period, *map(money.plain, amounts)))
    if as_json:
        write_json([dict(zip(("kind", "name", "period", "limit", "spent", "reserved"), row, strict=True)) for row in rows])
        return
    for kind, name, period, limit_text, spent, held in rows:
        console().print(f"{kind} {name}, {period}: {spent} spent and {held} reserved of {limit_text}", markup=False)


@app.command()
def alert(
    amount: Annotated[str, typer.Argument(help="Like 12.50, in the currency of the prices.")],
    to: Annotated[list[str], typer.Option(help="Address of who is told; repeat for several.")],
    kind: Annotated[Place, typer.Option(help="Whose spending.")] = Place.project,
    name: Annotated[str, typer.Option(help="The organization's or project's id.")] = "default",
    period: Annotated[Window, typer.Option(help="In a day or in a month, in UTC.")] = Window.month,
    as_json: JSON = False,
) -> None:
    """Tell people, once a day or month, when so much is spent. Nothing is refused by it."""
    from cluster.tenancy import budgets, money
    from cluster.tenancy.spend_alerts import Wish
    from mmaas.commands import accounts

    with accounts.opened() as opened:
        wish = Wish(money.parse(amount), period.value, tuple(to))
        made = opened.spend_alerts.create(_organization(opened, kind, name), budgets.scope(kind.value, name), wish)
    told = f"{made.id}: {', '.join(to)} when {kind.value} {name} has spent {amount} in a {period.value}"
    accounts.say({"id": made.id}, told, as_json=as_json)


def _organization(opened: Accounts, kind: Place, name: str) -> str:
    """Raises NotFound."""
    found = opened.projects
    return found.organization(name).id if kind is Place.organization else found.owner(name)


@app.command()
def alerts(as_json: JSON = False) -> None:
    """Show the spend alerts, and when each was passed last."""
    from cluster.tenancy import money
    from cluster.tenancy.periods import iso
    from mmaas.commands import accounts
    from mmaas.output import write_json

    with accounts.opened() as opened:
        found = opened.spend_alerts.everywhere()
        passed = opened.spend_alerts.passed([one.id for one in found])
    rows = []
    for one in found:
        last = passed.get(one.id)
        told = ("", "") if last is None else (iso(last.passed_at), money.plain(last.spent))
        rows.append((one.id, one.scope, one.wish.period, money.plain(one.wish.threshold), ", ".join(one.wish.recipients), *told))
    headings = ("id", "scope", "period", "threshold", "recipients", "last_passed", "spent")
    if as_json:
        write_json([dict(zip(headings, row, strict=True)) for row in rows])
    else:
        accounts.show(headings, rows)


@app.command()
def forget(alert_id: Annotated[str, typer.Argument(help="An alert's id.")]) -> None:
    """Take a spend alert away."""
    from cluster.errors import NotFound
    from mmaas.commands import accounts
    from mmaas.output import console

    with accounts.opened() as opened:
        known = opened.spend_alerts
        scope = next((one.scope for one in known.everywhere() if one.id == alert_id), None)
        if scope is None:
            raise NotFound("There is no such spend alert.")
        known.delete(scope, alert_id)
    console().print(f"{alert_id} is gone", markup=False)
