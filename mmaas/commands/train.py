"""`mmaas train …`: training jobs started from the terminal."""

from __future__ import annotations

import typer

app = typer.Typer(help="Train models.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Train models."""


@app.command()
def demo() -> None:
    """Train the demonstration chat model and make it the champion."""
    from cluster import raynode, settings
    from mmaas.output import console
    from pipelines import demonstration

    loaded = settings.load()
    raynode.join(loaded)
    version = demonstration.run(loaded, console())
    console().print(f"Registered models:/{version.name}/{version.version}")
