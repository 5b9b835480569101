"""A platform of a benchmark's own, in a new home, that ends with the benchmark however that ends.

A guard, a process in a session of its own, reads until its input ends. The benchmark holds the other end, so that is when it is
done, interrupted or killed. The guard then ends the commands that were still at work and the platform, and removes the home.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from bench.engines import ROOT
from cluster import launch, processes
from cluster.settings import Settings, load
from tests.e2e.platform import RunningPlatform, private_environment

COMMANDS_S = 5.0
"""That a command of the benchmark's has to end by itself."""
ENDED_S = 120.0


@contextmanager
def guarded(environment: Callable[[Path], dict[str, str]]) -> Iterator[RunningPlatform]:
    """`environment`: the platform's settings, from its home. Nothing is started yet. Raises RuntimeError when it doesn't end."""
    folder = Path(tempfile.mkdtemp(prefix="mmaas-"))
    platform = RunningPlatform(environment(folder / "home"))
    guard = subprocess.Popen(
        [sys.executable, "-m", "bench.guarded", str(folder)],
        env=os.environ | platform.environment | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the benchmark
    )
    try:
        yield platform
    finally:
        assert guard.stdin, "it was given one"
        guard.stdin.close()
        if guard.wait(ENDED_S):
            raise RuntimeError(f"the platform in {folder} did not end; run: MMAAS_HOME={folder}/home mmaas down")


def usual_engine(home: Path) -> dict[str, str]:
    """Settings of a platform beside which another may run; not those of the tests' tiny engine."""
    return {name: value for name, value in private_environment(home).items() if "ENGINE" not in name}


def main(folder: Path) -> None:
    sys.stdin.buffer.read()
    settings = load()
    processes.end(_commands(settings), COMMANDS_S)
    launch.stop(settings)
    shutil.rmtree(folder, ignore_errors=True)


def _commands(settings: Settings) -> list[psutil.Process]:
    """Such as `mmaas up`: they know the home, and are no part of the platform. Without them nothing is started any more."""
    others = {os.getpid(), *(process.pid for process in launch.family(settings))}
    return [process for process in psutil.process_iter() if process.pid not in others and _home(process) == str(settings.home)]


def _home(process: psutil.Process) -> str | None:
    with suppress(psutil.Error):
        return process.environ().get("MMAAS_HOME")
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
