"""`mmaas keys create`, `list` and `revoke`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from mmaas.commands.platform import JSON

if TYPE_CHECKING:
    from cluster.tenancy.keys import Key, Keys

Record = Callable[[str, str, "Mapping[str, object] | None", "str | None"], None]
"""Writes down an act: what, of which key, what it is now, whose."""

app = typer.Typer(help="API keys.", no_args_is_help=True)


@app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose calls the key makes.")] = "default",
    name: Annotated[str, typer.Option(help="What the key is for.")] = "unnamed",
    scope: Annotated[list[str] | None, typer.Option(help="inference, admin; repeat for several.")] = None,
    days: Annotated[float | None, typer.Option(min=0.0, help="Days until it expires; never by default.")] = None,
    as_json: JSON = False,
) -> None:
    """Make a key and show it, this once."""
    import time

    from mmaas.output import console, write_json

    scopes = scope or ["inference"]
    with _keys() as (keys, record):
        key_id, text = keys.create(tenant, name, scopes, None if days is None else time.time() + days * 86400)
        record("api_key.created", key_id, {"name": name, "scopes": scopes, "days": days}, tenant)
    if as_json:
        write_json({"id": key_id, "tenant": tenant, "key": text})
        return
    console().print(text, markup=False, soft_wrap=True)
    console(stderr=True).print("Keep it: it can't be shown again.")


@app.command("list")
def list_keys(tenant: Annotated[str | None, typer.Option(help="Only this tenant's keys.")] = None, as_json: JSON = False) -> None:
    """Show the keys, without their secrets."""
    from mmaas.output import write_json

    with _keys() as (keys, _):
        found = keys.list(tenant)
    if as_json:
        write_json([_as_json(key) for key in found])
    else:
        _print(found)


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(help="Id of the key, as `mmaas keys list` shows it.")]) -> None:
    """End a key at once."""
    from mmaas.output import console

    with _keys() as (keys, record):
        keys.revoke(key_id)
        record("api_key.deleted", key_id, None, None)
    console().print(f"Revoked {key_id}")


@contextlib.contextmanager
def _keys() -> Iterator[tuple[Keys, Record]]:
    from cluster import settings
    from cluster.private_files import Secrets
    from cluster.tenancy.keys import Keys
    from mmaas.audited import audit_of, person
    from mmaas.up import opened_store

    loaded = settings.load()
    with opened_store(loaded) as store:
        audit = audit_of(store, loaded)

        def record(action: str, key_id: str, after: Mapping[str, object] | None, tenant: str | None) -> None:
            audit.record(person(), action, key_id, None, after, project=tenant)

        yield Keys(store, Secrets(loaded.home).pepper), record


def _as_json(key: Key) -> dict[str, object]:
    return {
        "id": key.id,
        "tenant": key.tenant,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
    }


def _print(keys: list[Key]) -> None:
    import datetime

    from rich.table import Table
    from rich.text import Text

    from mmaas.output import console

    def day(seconds: float | None) -> str:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M") if seconds else ""

    table = Table(box=None, pad_edge=False)
    for heading in ("id", "tenant", "name", "scopes", "created (UTC)", "expires", "revoked"):
        table.add_column(heading)
    for key in keys:
        times = (day(key.created_at), day(key.expires_at), day(key.revoked_at))
        table.add_row(key.id, key.tenant, Text(key.name), " ".join(sorted(key.scopes)), *times)
    console().print(table)
