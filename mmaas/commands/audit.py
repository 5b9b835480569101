"""`mmaas audit list`, `verify` and `export`: what was done and denied, and whether the log of it is true."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmaas.commands.platform import JSON

if TYPE_CHECKING:
    from cluster.settings import Settings
    from cluster.tenancy.audit import Audit
    from cluster.tenancy.chain import Record

app = typer.Typer(help="The audit log.", no_args_is_help=True)


@app.command("list")
def list_records(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many, the newest first.")] = 50,
    action: Annotated[list[str] | None, typer.Option(help="Only this type, like api_key.created; repeat for several.")] = None,
    project: Annotated[list[str] | None, typer.Option(help="Only what was done in this project.")] = None,
    actor: Annotated[list[str] | None, typer.Option(help="Only what this key or person did.")] = None,
    as_json: JSON = False,
) -> None:
    """Show who did what, and who was refused."""
    from cluster.tenancy.audit import Wanted
    from cluster.tenancy.chain import to_json
    from mmaas.output import write_json

    with _audit() as (audit, _):
        records, _ = audit.list(Wanted(projects=project or (), actions=action or (), actors=actor or ()), limit=limit)
    if as_json:
        write_json([to_json(record) for record in records])
    else:
        _print(records)


@app.command()
def verify(
    file: Annotated[Path | None, typer.Argument(help="An exported log; none: the platform's own.", dir_okay=False)] = None,
    public_key: Annotated[str | None, typer.Option(help="Key that must have signed, in hexadecimal; none: the platform's.")] = None,
) -> None:
    """Prove that no record was changed, removed, inserted or cut off."""
    from mmaas import audited
    from mmaas.output import console

    with contextlib.ExitStack() as stack:
        if file is not None and public_key is not None:
            verdict = audited.verify_file(file, audited.public_key(public_key))
        else:
            audit, settings = stack.enter_context(_audit())
            expected = audited.public_key(public_key) if public_key else audit.public_key
            own = audit.verify(audited.kept_heads(settings))
            verdict = audited.verify_file(file, expected) if file is not None else (own.records, own.problems)
    records, problems = verdict
    for problem in problems:
        console().print(f"record {problem.number}: {problem.what}", markup=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)
    console().print(f"{records} records, all as they were written")


@app.command()
def export(file: Annotated[Path, typer.Argument(help="Where to write it; it must not exist.", dir_okay=False)]) -> None:
    """Write the whole log with its signed checkpoints as JSON lines, to be kept and verified elsewhere."""
    from mmaas import audited
    from mmaas.output import console

    with _audit() as (audit, _):
        many = audited.export(audit, file)
    key = audit.public_key.public_bytes_raw().hex()
    console().print(f"{many} records; verify with: mmaas audit verify {file} --public-key {key}", markup=False, soft_wrap=True)


@contextlib.contextmanager
def _audit() -> Iterator[tuple[Audit, Settings]]:
    from cluster import settings
    from mmaas.audited import audit_of
    from mmaas.up import opened_store

    loaded = settings.load()
    with opened_store(loaded) as store:
        yield audit_of(store, loaded), loaded


def _print(records: list[Record]) -> None:
    import datetime

    from rich.table import Table
    from rich.text import Text

    from mmaas.output import console

    table = Table(box=None, pad_edge=False)
    for heading in ("number", "when (UTC)", "who", "what", "of what", "project", "before", "after"):
        table.add_column(heading)
    for record in records:
        when = datetime.datetime.fromtimestamp(record.at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
        who = f"{record.actor.kind} {record.actor.id}"
        texts = (who, record.action, record.target or "", record.project or "", record.before or "", record.after or "")
        table.add_row(str(record.number), when, *map(Text, texts))
    console().print(table)
