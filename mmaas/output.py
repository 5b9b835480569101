"""What the command line writes: tables and lines for people, JSON for programs, one clear line for a failure."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.errors import PlatformError


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def write_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def complain(error: PlatformError, *, as_json: bool) -> int:
    """Write a failure that was foreseen; returns the exit status."""
    if as_json:
        write_json({"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.public_code}})
    else:
        console(stderr=True).print(f"mmaas: {error.message}", style="red", markup=False, soft_wrap=True)
    return 1
