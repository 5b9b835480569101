"""The compiled part of the engine: all C++ files beside this one, built by the machine's own compiler on first use.

Plain C++20 without torch's headers, so a build takes seconds; called through `ctypes` with addresses of memory that Python owns.
The library is cached under a digest of everything that goes into it, so that an upgrade or another CPU builds its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from cluster.private_files import private_directory

log = logging.getLogger(__name__)

FLAGS = [
    "-std=c++20",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-Wall",
    "-Wextra",
]
BUILD_TIMEOUT_S = 300


class NativeUnavailable(RuntimeError):
    """The compiled part can't be had on this machine; the message says why."""


@cache
def library(directory: Path) -> ctypes.CDLL:
    """The loaded library, from the cache in `directory` or built into it. Raises NativeUnavailable."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        raise NativeUnavailable("no C++ compiler is installed (Debian: apt install g++)")
    target = private_directory(directory / "native") / f"{_digest(compiler)}.so"
    if not target.exists():
        _build(compiler, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise NativeUnavailable(f"{target} can't be loaded: {error}; remove it to build it again") from error


def _build(compiler: str, target: Path) -> None:
    """Ranks may build at once: each writes its own file and the last rename wins, with the same content."""
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".so", delete=False) as file:
        unfinished = Path(file.name)
    try:
        command = [compiler, *FLAGS, *map(str, _sources()), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
        if done.returncode:
            raise NativeUnavailable(f"{compiler} failed: {done.stderr.strip()[-2000:]}")
        unfinished.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{compiler} could not be run: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _sources() -> list[Path]:
    return sorted(Path(__file__).parent.glob("*.cpp"))


def _digest(compiler: str) -> str:
    """Of sources, headers, flags, compiler and the CPU's abilities: `-march=native` means something else on another machine."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    facts = [*FLAGS, version, platform.machine(), _cpu_flags()]
    digest = hashlib.sha256("\0".join(facts).encode())
    for path in [*_sources(), *sorted(Path(__file__).parent.glob("*.h"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
