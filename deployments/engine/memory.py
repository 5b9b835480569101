"""Memory of this process and its machine: what can be had, and how what was freed gets back to the system. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def give_back() -> None:
    """Collect what is unreachable and return free heap pages. Large tensors return theirs by themselves, small ones don't."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc has no such call and keeps no such heap
        ctypes.CDLL(None).malloc_trim(0)


def available() -> int:
    """Bytes that could be taken without swapping, within the limit of this process's control group."""
    free = _kib(Path("/proc/meminfo"), "MemAvailable")
    with contextlib.suppress(OSError, ValueError):  # no group, or one without a limit ("max")
        free = min(free, int((_CGROUP / "memory.max").read_text()) - int((_CGROUP / "memory.current").read_text()))
    return max(0, free)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return _kib(Path("/proc/self/status"), "VmRSS")


def _kib(path: Path, field: str) -> int:
    lines = path.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
