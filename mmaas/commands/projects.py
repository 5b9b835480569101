"""`mmaas organizations create` and `list`; `mmaas projects create`, `list` and `archive`."""

from __future__ import annotations

from typing import Annotated

import typer

from mmaas.commands.platform import JSON

organizations = typer.Typer(help="Organizations: each has its own projects, users and admin keys.", no_args_is_help=True)
app = typer.Typer(help="Projects: what calls, data and costs belong to.", no_args_is_help=True)
Owner = Annotated[str, typer.Option("--organization", help="Id of the organization.")]


@organizations.command("create")
def create_organization(name: Annotated[str, typer.Argument(help="What it is called.")], as_json: JSON = False) -> None:
    """Make an organization. Its first admin key comes from `mmaas keys create --admin --organization ID --scope organization`."""
    from mmaas.commands import accounts

    with accounts.opened() as opened:
        made = opened.projects.found(name)
    accounts.say({"id": made.id, "name": made.name}, made.id, as_json=as_json)


@organizations.command("list")
def list_organizations(as_json: JSON = False) -> None:
    """Show the organizations."""
    from mmaas.commands import accounts
    from mmaas.output import write_json

    with accounts.opened() as opened:
        found = opened.projects.organizations()
    if as_json:
        write_json([{"id": one.id, "name": one.name, "created_at": one.created_at} for one in found])
    else:
        accounts.show(("id", "name", "created (UTC)"), ((one.id, one.name, accounts.day(one.created_at)) for one in found))


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What it is called.")], organization: Owner = "default", as_json: JSON = False
) -> None:
    """Make a project and show its id."""
    from mmaas.commands import accounts

    with accounts.opened() as opened:
        made = opened.projects.create(organization, name)
    accounts.say({"id": made.id, "name": made.name}, made.id, as_json=as_json)


@app.command("list")
def list_projects(
    organization: Owner = "default",
    archived: Annotated[bool, typer.Option("--archived", help="Those that ended, too.")] = False,
    as_json: JSON = False,
) -> None:
    """Show an organization's projects."""
    from mmaas.commands import accounts
    from mmaas.output import write_json

    with accounts.opened() as opened:
        page = opened.projects.list
        found = accounts.every(lambda asked: page(organization, asked, include_archived=archived), lambda one: one.id)
    if as_json:
        shown = ("id", "name", "created_at", "archived_at")
        write_json([{name: getattr(one, name) for name in shown} for one in found])
        return
    rows = ((one.id, one.name, accounts.day(one.created_at), accounts.day(one.archived_at)) for one in found)
    accounts.show(("id", "name", "created (UTC)", "archived"), rows)


@app.command()
def archive(project: Annotated[str, typer.Argument(help="Id of the project.")], organization: Owner = "default") -> None:
    """End a project, and with it its keys, for good."""
    from mmaas.commands import accounts
    from mmaas.output import console

    with accounts.opened() as opened:
        opened.projects.archive(organization, project)
    console().print(f"Archived {project}", markup=False)
