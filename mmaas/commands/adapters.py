"""`mmaas adapters add`, `list` and `remove`: LoRA adapters that callers name as BASE:NAME."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mmaas.commands.platform import JSON

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.settings import Settings
    from cluster.types import Adapter, Deployment

app = typer.Typer(help="LoRA adapters of served models.", no_args_is_help=True)

NAME_HELP = "The adapter's name: callers put BASE:NAME into `model`."
BASE_HELP = "The served model that it belongs to."


@app.command()
def add(
    name: Annotated[str, typer.Argument(help=NAME_HELP)],
    base: Annotated[str, typer.Option(help=BASE_HELP)],
    path: Annotated[str, typer.Option(help="Directory with adapter_config.json and adapter_model.safetensors.")],
) -> None:
    """Keep an adapter in the library and serve it as BASE:NAME, or put a newer one in its place."""
    from cluster import settings
    from cluster.adapters import Catalog
    from cluster.desired import Desired
    from cluster.types import Adapter
    from mmaas.audited import noting
    from mmaas.output import console
    from mmaas.up import opened_store

    loaded = settings.load()
    with opened_store(loaded) as store:
        address = _published(located(path), Desired(store).get(base), loaded)
        adapter = Catalog(store, note=noting(store, loaded)).put(Adapter(base, name, address))
    console().print(f"{adapter.model} is served from now on, and loaded when it is first asked for", markup=False)


@app.command("list")
def list_adapters(
    base: Annotated[str | None, typer.Option(help="Only those of this served model.")] = None, as_json: JSON = False
) -> None:
    """Show the adapters."""
    from cluster import settings
    from cluster.adapters import Catalog
    from mmaas.output import write_json
    from mmaas.up import opened_store

    with opened_store(settings.load()) as store:
        found = [adapter for adapter in Catalog(store).list() if base in (None, adapter.base)]
    if as_json:
        write_json([{"model": one.model, "base": one.base, "name": one.name, "address": one.address} for one in found])
    else:
        _print(found)


@app.command()
def remove(name: Annotated[str, typer.Argument(help=NAME_HELP)], base: Annotated[str, typer.Option(help=BASE_HELP)]) -> None:
    """Stop serving BASE:NAME. Requests that use it finish; its files stay in the library."""
    from cluster import settings
    from cluster.adapters import Catalog
    from mmaas.audited import noting
    from mmaas.output import console
    from mmaas.up import opened_store

    loaded = settings.load()
    with opened_store(loaded) as store:
        Catalog(store, note=noting(store, loaded)).delete(base, name)
    console().print(f"Removed {base}:{name}", markup=False)


def located(path: str) -> Path:
    """Raises InvalidRequest for what is no directory here."""
    from pathlib import Path

    from cluster.errors import InvalidRequest

    directory = Path(path).expanduser().absolute()
    if not directory.is_dir():
        raise InvalidRequest(f"{path} is no directory here", param="path")
    return directory


def _published(directory: Path, base: Deployment, settings: Settings) -> str:
    """The address in the library, once every number has been read. Raises ModelNotServable for what doesn't fit the base."""
    import shutil
    import tempfile
    from pathlib import Path

    from cluster.storage import Storage
    from deployments import fleet
    from deployments.engine.adapter_files import CONFIG, WEIGHTS, base_shapes, inspect
    from deployments.engine.adapters import check_numbers

    shapes = base_shapes(fleet.find(base, settings).directory)
    with tempfile.TemporaryDirectory() as copy:  # of the two files that count: what was checked is what is kept
        inspect(directory, shapes)
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(directory / name, Path(copy) / name)
        check_numbers(inspect(Path(copy), shapes))
        return Storage(settings.home / "library").publish(copy).address


def _print(found: list[Adapter]) -> None:
    import datetime

    from rich.table import Table

    from mmaas.output import console

    table = Table(box=None, pad_edge=False)
    for heading in ("model", "files", "since (UTC)"):
        table.add_column(heading)
    for adapter in found:
        since = datetime.datetime.fromtimestamp(adapter.created_at, datetime.UTC).strftime("%Y-%m-%d %H:%M")
        table.add_row(adapter.model, adapter.address[:12], since)
    console().print(table)
