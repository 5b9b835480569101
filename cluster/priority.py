"""Who goes first where processes share cores.

Linux shares a core by weight, which niceness sets: 2.4 times as much at 15, where Ray starts its workers, as at 19. The ranks of a
model work in lockstep, so that whoever keeps one of them off its core stops them all: what is around them (gateways, replicas) and
what has time (training) steps back behind them. Not further, though: a model in use may keep its cores busy without a pause, and a
gateway that gets a thirtieth of one beside it is late with everything.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

BEHIND = 19
"""The highest niceness there is; nobody needs a privilege to go there."""


def step_back() -> None:
    """This process, for good: only root may come forward again."""
    put("self", BEHIND)


def put(process: int | Literal["self"], niceness: int) -> None:
    """All threads of a process, and so those that they start: Linux keeps niceness by thread, others by process."""
    tasks = Path(f"/proc/{process}/task")
    threads = [int(task.name) for task in tasks.iterdir()] if tasks.exists() else [0 if process == "self" else process]
    for thread in threads:
        with suppress(ProcessLookupError):  # one that has ended meanwhile
            os.setpriority(os.PRIO_PROCESS, thread, niceness)
