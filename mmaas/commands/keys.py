"""`mmaas keys create`, `list`, `rotate` and `revoke`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mmaas.commands.platform import JSON

if TYPE_CHECKING:
    from cluster.tenancy.key_records import Key

app = typer.Typer(help="API keys.", no_args_is_help=True)


@app.command()
def create(
    project: Annotated[str, typer.Option("--project", "--tenant", help="Id of the project whose calls the key makes.")] = "default",
    name: Annotated[str, typer.Option(help="What the key is for.")] = "unnamed",
    scope: Annotated[list[str] | None, typer.Option(help="inference, annotate; repeat for several.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model that the key is for; repeat for several.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="An admin key, of an organization instead of a project.")] = False,
    organization: Annotated[str, typer.Option(help="Id of an admin key's organization.")] = "default",
    user: Annotated[str | None, typer.Option(help="Id of the user whose key it is.")] = None,
    days: Annotated[float | None, typer.Option(min=0.0, help="Days until it expires; never by default.")] = None,
    as_json: JSON = False,
) -> None:
    """Make a key and show it, this once. An admin key's scope is admin (the platform, too) unless said otherwise."""
    import time

    from mmaas.commands import accounts
    from mmaas.output import console, write_json

    ends_at = None if days is None else time.time() + days * 86400
    with accounts.opened() as opened:
        if admin:
            key_id, text = opened.keys.create_admin(organization, name, scope or ["admin"], ends_at, user=user)
        else:
            key_id, text = opened.keys.create(project, name, scope or ["inference"], ends_at, models=model, user=user)
    if as_json:
        write_json({"id": key_id, "project": None if admin else project, "key": text})
        return
    console().print(text, markup=False, soft_wrap=True)
    console(stderr=True).print("Keep it: it can't be shown again.")


@app.command("list")
def list_keys(
    project: Annotated[str | None, typer.Option("--project", "--tenant", help="Only this project's keys.")] = None,
    as_json: JSON = False,
) -> None:
    """Show the keys, without their secrets."""
    from mmaas.commands import accounts
    from mmaas.output import write_json

    with accounts.opened() as opened:
        found = opened.keys.list(project)
    if as_json:
        write_json([_as_json(key) for key in found])
    else:
        accounts.show(("id", "project", "name", "scopes", "created (UTC)", "last used", "expires", "revoked"), map(_row, found))


@app.command()
def rotate(
    key_id: Annotated[str, typer.Argument(help="Id of the key, as `mmaas keys list` shows it.")],
    hours: Annotated[float, typer.Option(min=0.0, help="How long the old key still works.")] = 24.0,
    as_json: JSON = False,
) -> None:
    """Make a key's successor and show it, this once."""
    from mmaas.commands import accounts
    from mmaas.output import console, write_json

    with accounts.opened() as opened:
        new_id, text = opened.keys.rotate(key_id, hours * 3600)
    if as_json:
        write_json({"id": new_id, "replaces": key_id, "key": text})
        return
    console().print(text, markup=False, soft_wrap=True)
    console(stderr=True).print(f"Keep it: it can't be shown again. {key_id} ends in {hours:g} hours.")


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(help="Id of the key, as `mmaas keys list` shows it.")]) -> None:
    """End a key at once."""
    from mmaas.commands import accounts
    from mmaas.output import console

    with accounts.opened() as opened:
        opened.keys.revoke(key_id)
    console().print(f"Revoked {key_id}")


def _as_json(key: Key) -> dict[str, object]:
    return {
        "id": key.id,
        "organization": key.organization,
        "project": key.project,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "models": None if key.models is None else sorted(key.models),
        "owner": key.owner.id if key.owner else None,
        "created_at": key.created_at,
        "last_used_at": key.last_used_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
    }


def _row(key: Key) -> tuple[str, ...]:
    from mmaas.commands.accounts import day

    times = (day(key.created_at), day(key.last_used_at), day(key.expires_at), day(key.revoked_at))
    return (key.id, key.project or f"({key.organization})", key.name, " ".join(sorted(key.scopes)), *times)
