"""`mmaas users invite`, `accept`, `list`, `role` and `remove`."""

from __future__ import annotations

from typing import Annotated

import typer

from mmaas.commands.platform import JSON

app = typer.Typer(help="People of an organization.", no_args_is_help=True)
Owner = Annotated[str, typer.Option("--organization", help="Id of the organization.")]
UserId = Annotated[str, typer.Argument(help="Id of the user, as `mmaas users list` shows it.")]
ROLES = "owner, admin, developer, analyst, annotator, auditor, billing, reader, or a custom role's id."


@app.command()
def invite(
    email: Annotated[str, typer.Argument(help="Address of who is invited; nothing is mailed.")],
    role: Annotated[str, typer.Option(help=ROLES)] = "reader",
    project: Annotated[list[str] | None, typer.Option(help="PROJECT=ROLE to come into, too; repeat for several.")] = None,
    organization: Owner = "default",
    as_json: JSON = False,
) -> None:
    """Invite somebody and show the token to hand over, this once."""
    from cluster.errors import InvalidRequest
    from mmaas.commands import accounts

    within = dict(text.partition("=")[::2] for text in project or ())
    if not all(within.values()):
        raise InvalidRequest("write --project PROJECT=ROLE", param="project")
    with accounts.opened() as opened:
        made, token = opened.invites.create(organization, email, role, within)
    accounts.say({"id": made.id, "token": token}, token, as_json=as_json)


@app.command()
def accept(
    token: Annotated[str, typer.Argument(help="The token of an invitation.")],
    name: Annotated[str, typer.Option(help="The user's name.")],
    as_json: JSON = False,
) -> None:
    """Accept an invitation and show the new user's id."""
    from mmaas.commands import accounts

    with accounts.opened() as opened:
        made = opened.invites.accept(token, name)
    accounts.say({"id": made.id, "email": made.email}, made.id, as_json=as_json)


@app.command("list")
def list_users(organization: Owner = "default", as_json: JSON = False) -> None:
    """Show an organization's users."""
    from mmaas.commands import accounts
    from mmaas.output import write_json

    with accounts.opened() as opened:
        found = accounts.every(lambda asked: opened.users.list(organization, asked), lambda one: one.id)
        names = opened.roles.names(organization, None)
    if as_json:
        write_json([{"id": one.id, "email": one.email, "name": one.name, "role": names[one.role_id]} for one in found])
    else:
        rows = ((one.id, one.email, one.name, names[one.role_id], accounts.day(one.created_at)) for one in found)
        accounts.show(("id", "address", "name", "role", "since (UTC)"), rows)


@app.command("role")
def set_role(user: UserId, role: Annotated[str, typer.Argument(help=ROLES)], organization: Owner = "default") -> None:
    """Give a user another role in the organization."""
    from mmaas.commands import accounts
    from mmaas.output import console

    with accounts.opened() as opened:
        opened.users.set_role(organization, user, role)
    console().print(f"{user} is {role}", markup=False)


@app.command()
def remove(user: UserId, organization: Owner = "default") -> None:
    """Take a user out of the organization; their keys end."""
    from mmaas.commands import accounts
    from mmaas.output import console

    with accounts.opened() as opened:
        opened.users.remove(organization, user)
    console().print(f"Removed {user}", markup=False)
