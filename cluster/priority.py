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

BEHIND = 19
"""The highest niceness there is; nobody needs a privilege to go there."""
TASKS = Path("/proc/self/task")


def step_back() -> None:
    """All threads of this process, and so those that they start. Linux keeps niceness by thread."""
    threads = [int(task.name) for task in TASKS.iterdir()] if TASKS.exists() else [0]
    for thread in threads:
        with suppress(ProcessLookupError):  # one that has ended meanwhile
            os.setpriority(os.PRIO_PROCESS, thread, BEHIND)
