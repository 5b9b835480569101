"""The compiled parts: all C++ files of a folder, built by the machine's own compiler on first use. The engine's lie beside this
file, with headers that others use, too.

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


HERE = Path(__file__).parent


@cache
def library(directory: Path, folder: Path = HERE) -> ctypes.CDLL:
    """The loaded library of the sources in `folder`, from the cache in `directory` or built into it. Raises NativeUnavailable."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        raise NativeUnavailable("no C++ compiler is installed (Debian: apt install g++)")
    target = private_directory(directory / "native") / f"{_digest(compiler, folder)}.so"
    if not target.exists():
        _build(compiler, target, folder)
    try:
        return ctypes.CDLL(str(target), use_errno=True)
    except OSError as error:
        raise NativeUnavailable(f"{target} can't be loaded: {error}; remove it to build it again") from error


def _build(compiler: str, target: Path, folder: Path) -> None:
    """Ranks may build at once: each writes its own file and the last rename wins, with the same content."""
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".so", delete=False) as file:
        unfinished = Path(file.name)
    try:
        command = [compiler, *FLAGS, f"-I{HERE}", *map(str, _sources(folder)), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
        if done.returncode:
            raise NativeUnavailable(f"{compiler} failed: {done.stderr.strip()[-2000:]}")
        unfinished.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{compiler} could not be run: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _sources(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.cpp"))


def _digest(compiler: str, folder: Path) -> str:
    """Of sources, headers, flags, compiler and the CPU's abilities: `-march=native` means something else on another machine."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    facts = [*FLAGS, version, platform.machine(), _cpu_flags()]
    digest = hashlib.sha256("\0".join(facts).encode())
    for path in [*_sources(folder), *sorted(HERE.glob("*.h"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
