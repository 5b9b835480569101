"""`mmaas up`, `down`, `status` and `doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cluster.doctor import Check

JSON = Annotated[bool, typer.Option("--json", help="Write JSON for programs.")]


def add_to(app: typer.Typer) -> None:
    for command in (up, down, status, doctor):
        app.command()(command)


def up(
    model: Annotated[str | None, typer.Option(help="Directory or Hugging Face id of a causal language model.")] = None,
    name: Annotated[str | None, typer.Option(help="Name to serve --model under; its last path part by default.")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Shards that hold one copy of the model, or of one of its stages.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Stages that the model's layers are cut into.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    quantization: Annotated[str | None, typer.Option(help="Weights in eight bits, made at load: int8, or fp8 on GPUs.")] = None,
) -> None:
    """Start the platform; train the demonstration model if there is nothing to serve. Running it again repairs what is missing."""
    from cluster import log, settings
    from mmaas import up as story
    from mmaas.output import console

    loaded = settings.load()
    log.configure("WARNING")
    story.up(loaded, story.Asked(model, name, tp, dtype, pp, quantization), console())


def down() -> None:
    """End every process of the platform. Models, runs and keys stay in HOME."""
    from cluster import launch, settings
    from mmaas.output import console

    loaded = settings.load()
    with console().status("ending processes"):
        ended = launch.stop(loaded)
    console().print(f"Ended {ended} processes; data stays in {loaded.home}" if ended else "Nothing was running")


def status(as_json: JSON = False) -> None:
    """What runs, what is served and what waits for what."""
    from cluster import settings
    from mmaas import status as view
    from mmaas.output import console, write_json

    found = view.collect(settings.load())
    if as_json:
        write_json(found.as_json())
    else:
        view.render(found, console())


def doctor(
    as_json: JSON = False,
    security: Annotated[bool, typer.Option("--security", help="Knock at the running system as a stranger would.")] = False,
) -> None:
    """Check machine, installation and running platform, and say what to do. Exit status 1 when a check fails."""
    import dataclasses

    from cluster import doctor, settings
    from cluster import security as stranger
    from mmaas.output import write_json

    checks = (stranger if security else doctor).examine(settings.load())
    if as_json:
        write_json([dataclasses.asdict(check) for check in checks])
    else:
        _print_checks(checks)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


def _print_checks(checks: list[Check]) -> None:
    from rich.table import Table
    from rich.text import Text

    from mmaas.output import console

    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table(box=None, pad_edge=False)
    for heading in ("", "check", "seen", "what to do"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        table.add_row(Text(check.status, colours[check.status]), check.name, Text(check.seen), Text(check.advice))
    console().print(table)
