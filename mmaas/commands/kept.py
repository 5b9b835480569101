"""`mmaas kept allow`, `list`, `show` and `forget`: inputs and outputs that a project lets the platform keep."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from mmaas.commands.platform import JSON

if TYPE_CHECKING:
    from cluster.tenancy.audit import Audit
    from cluster.tenancy.consents import Consents
    from cluster.tenancy.kept_files import KeptFiles

app = typer.Typer(help="Kept inputs and outputs, of projects that consented.", no_args_is_help=True)

PROJECT = Annotated[str, typer.Argument(help="The project's id.")]


@app.command()
def allow(
    project: PROJECT,
    share: Annotated[float, typer.Option(min=0, max=1, help="Part of the calls that is kept; 0: none any more.")],
    days: Annotated[float, typer.Option(min=0.01, help="How long they are kept.")] = 30,
    redaction: Annotated[str, typer.Option(help="What is cut out of them first: keys, contacts, or none.")] = "keys",
) -> None:
    """Keep a sample of a project's calls from now on, or no longer."""
    from cluster.tenancy.consents import DAY_S, Consent

    with _kept() as (consents, _, _):
        consents.put(Consent(project, share, days * DAY_S, None if redaction == "none" else redaction))


@app.command("list")
def list_consents(as_json: JSON = False) -> None:
    """Show which projects consented to what."""
    from dataclasses import asdict

    from mmaas.output import console, write_json

    with _kept() as (consents, _, _):
        found = consents.list()
    if as_json:
        write_json([asdict(consent) for consent in found])
    for consent in [] if as_json else found:
        words = (
            f"{consent.tenant}: {consent.share:.1%} for {consent.keep_s / 86400:g} days, without {consent.redaction or 'redaction'}"
        )
        console().print(words, markup=False)


@app.command()
def show(project: PROJECT, request_id: Annotated[str, typer.Argument(help="The call's x-request-id.")]) -> None:
    """Show a kept call as JSON. That it was looked at is recorded."""
    import json
    from dataclasses import asdict

    from mmaas.audited import person
    from mmaas.output import write_json

    with _kept() as (_, files, audit):
        call = files.find(project, request_id)
        audit.record(person(), "kept_call.read", request_id, project=project)
    write_json({**asdict(call), "input": json.loads(call.input), "output": json.loads(call.output)})


@app.command()
def forget(project: PROJECT) -> None:
    """Remove everything that was kept of a project, and keep nothing any more."""
    from dataclasses import replace

    from cluster.tenancy.consents import Consent
    from mmaas.audited import person

    with _kept() as (consents, files, audit):
        given = next((one for one in consents.list() if one.tenant == project), Consent(project, 0))
        consents.put(replace(given, share=0))
        files.forget(project)
        audit.record(person(), "kept_calls.forgotten", project, project=project)


@contextlib.contextmanager
def _kept() -> Iterator[tuple[Consents, KeptFiles, Audit]]:
    from cluster import settings
    from cluster.tenancy.kept_files import KeptFiles
    from mmaas.audited import accounts_of, audit_of
    from mmaas.up import opened_store

    loaded = settings.load()
    with opened_store(loaded) as store:
        yield accounts_of(store, loaded).consents, KeptFiles(loaded.home / "kept"), audit_of(store, loaded)
