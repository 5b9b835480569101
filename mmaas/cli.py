"""The `mmaas` command: parses what a person types and calls the platform. Decides nothing itself.

Everything heavy is imported inside the commands, so that `mmaas --help` answers at once. Failures of the platform are one clear
line on stderr (JSON with --json) and exit status 1; Ctrl-C is status 130 and leaves a state that the next `mmaas up` repairs.
"""

from __future__ import annotations

import sys

import typer

from mmaas.commands import (
    adapters,
    audit,
    budgets,
    chat,
    invoice,
    kept,
    keys,
    models,
    plan,
    platform,
    prices,
    projects,
    train,
    usage,
    users,
)

app = typer.Typer(
    name="mmaas",
    help="Massive Model as a Service: serve, train and run large models on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
platform.add_to(app)
models.add_to(app)
plan.add_to(app)
app.add_typer(adapters.app, name="adapters")
app.add_typer(projects.organizations, name="organizations")
app.add_typer(projects.app, name="projects")
app.add_typer(users.app, name="users")
app.add_typer(keys.app, name="keys")
usage.add_to(app)
app.add_typer(invoice.app, name="invoice")
app.add_typer(prices.app, name="prices")
app.add_typer(budgets.app, name="budgets")
app.add_typer(audit.app, name="audit")
app.add_typer(kept.app, name="kept")
chat.add_to(app)
app.add_typer(train.app, name="train")


def main() -> None:
    """Entry point of the `mmaas` script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit status."""
    from cluster.errors import PlatformError

    try:
        app(arguments)
    except PlatformError as error:
        from mmaas.output import complain

        return complain(error, as_json="--json" in arguments)
    except SystemExit as leaving:
        if leaving.code == 130:  # typer's status for Ctrl-C
            sys.stderr.write("interrupted; `mmaas up` continues from here\n")
        return leaving.code if isinstance(leaving.code, int) else 0
    return 0
