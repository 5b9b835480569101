"""That nothing of a benchmark's platform outlives the benchmark: what stands for both are sleeping processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster import processes

ROOT = Path(__file__).parents[2]
BENCHMARK = """
import os, sys
from bench.guarded import guarded
from cluster import launch, processes
from tests.e2e.platform import private_environment

with guarded(private_environment) as platform:
    home = platform.settings.home
    mark = launch.parts(platform.settings)[0].mark
    part = processes.spawn(["sleep", "600"], os.environ | {processes.MARK: mark}, home / "log")
    print(home, part.pid, flush=True)
    if sys.argv[1] == "fails":
        raise RuntimeError("on purpose")
    if sys.argv[1] == "works":
        platform.run("sleep", "600", timeout=600)
"""


def benchmark(how: str) -> tuple[subprocess.Popen[str], Path, psutil.Process]:
    """A program with a platform: its home, and the process that stands for a part of it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MMAAS_")}
    words = [sys.executable, "-c", BENCHMARK, how]
    program = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert program.stdout
    home, pid = program.stdout.readline().split()
    return program, Path(home), psutil.Process(int(pid))


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "that never came"
        time.sleep(0.05)


def command(program: subprocess.Popen[str], home: Path) -> psutil.Process | None:
    """What the benchmark has running in its platform's name."""
    children = [child for child in psutil.Process(program.pid).children() if child.name() == "sleep"]
    return next((child for child in children if child.environ().get("MMAAS_HOME") == str(home)), None)


@pytest.mark.parametrize("how", ["ends", "fails"])
def test_a_benchmark_that_is_done_has_ended_its_platform(how: str) -> None:
    program, home, part = benchmark(how)
    _, said = program.communicate(timeout=100)
    assert processes.wait([part], 5) == []
    assert not home.parent.exists()
    assert (program.returncode, "on purpose" in said) == ((1, True) if how == "fails" else (0, False))


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_benchmark_that_is_killed_leaves_nothing(sign: signal.Signals) -> None:
    """Nor the command that it waited for, which would go on starting things."""
    program, home, part = benchmark("works")
    until(lambda: command(program, home) is not None)
    running = command(program, home)
    assert running
    program.send_signal(sign)
    program.communicate(timeout=100)
    until(lambda: not home.parent.exists())
    assert program.returncode
    assert processes.wait([part, running], 5) == []
