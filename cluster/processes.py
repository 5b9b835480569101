"""Processes of this machine: started detached, remembered with their start time, ended together with all they started.

A process belongs to a platform when it is one that was recorded, a descendant of one, or carries the platform's mark in its
environment. The mark finds what lost its parent; nothing is ever looked up by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.private_files import private_directory, write_private

MARK = "LAUNCHED_BY_MMAAS"
"""Environment variable that marks every process of a platform with the platform's identity."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told from later ones with the same pid by its start (seconds since the epoch)."""

    pid: int
    started: float

    @classmethod
    def of(cls, pid: int) -> Process:
        """Raises psutil.NoSuchProcess when there is none."""
        return cls(pid, psutil.Process(pid).create_time())

    def find(self) -> psutil.Process | None:
        """The running process, None when it ended (a zombie counts as ended)."""
        try:
            found = psutil.Process(self.pid)
            # The clock may be stepped between two readings of the same start, by far less than a pid needs to come round.
            same = abs(found.create_time() - self.started) < 2.0
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


def spawn(argv: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
    """Start a program in its own session, so that Ctrl-C in our terminal never reaches it; output is appended to `log`."""
    private_directory(log.parent)
    with log.open("ab") as output:
        child = subprocess.Popen(
            argv, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, cwd="/"
        )
    _children.append(child)
    return Process.of(child.pid)


_children: list[subprocess.Popen[bytes]] = []  # kept for their exit status: without a wait they would stay as zombies


def save(path: Path, process: Process) -> None:
    write_private(path, json.dumps(asdict(process)).encode())


def load(path: Path) -> Process | None:
    """The recorded process, None without a readable record (the mark then still finds what runs)."""
    try:
        return Process(**json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def family(recorded: Iterable[Process], mark: str) -> list[psutil.Process]:
    """Every running process that belongs to the platform with this mark: the recorded, the marked, and all their descendants."""
    roots = [root for process in recorded if (root := process.find())] + _marked(mark)
    members = {root.pid: root for root in roots}
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            members.update((child.pid, child) for child in root.children(recursive=True))
    members.pop(os.getpid(), None)
    return [process for process in members.values() if _is_running(process)]


def _marked(mark: str) -> list[psutil.Process]:
    wanted = f"{MARK}={mark}".encode()
    return [process for process in psutil.process_iter() if wanted in _environment(process.pid)]


def _environment(pid: int) -> list[bytes]:
    """The environment a process was started with; empty for other users' processes, and where /proc does not tell."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def end(processes: Sequence[psutil.Process], grace_s: float) -> list[psutil.Process]:
    """Ask each to end, wait at most `grace_s`, then kill. Returns the ones that still run, which should be none."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in wait(processes, grace_s):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return wait(processes, 5.0)


def wait(processes: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait until all ended, at most `seconds`; returns the ones that still run."""
    deadline = time.monotonic() + seconds
    while left := [process for process in processes if _is_running(process)]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.05)
    return []


def _is_running(process: psutil.Process) -> bool:
    for child in _children:
        child.poll()
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
