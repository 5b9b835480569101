"""Whether a replica takes a constraint: it is tried out in a process of its own (`engine/trial.py`) before it reaches the ranks.

Outcomes are remembered by digest, for each tenant apart, so that nobody learns by the time of an answer what others ask for. What a
constraint says is in no log.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import deployments
from cluster.errors import InvalidRequest, Overloaded, Unavailable
from cluster.types import Constraint
from deployments.engine.trial import LENGTH, MAX_WORDS, WALL_S

MAX_REMEMBERED = 1024
MAX_AT_ONCE = 2
MAX_WAITING = 32
START_S = 60.0
"""For reading the vocabulary."""


class Admission:
    """Of one replica. Its process starts with the first constraint and ends with the replica, or when it doesn't answer."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._outcomes: OrderedDict[bytes, str | None] = OrderedDict()
        self._trials: dict[bytes, asyncio.Task[str | None]] = {}
        self._room = asyncio.Semaphore(MAX_AT_ONCE)
        self._process: _Process | None = None
        self._starting = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._process.pid if self._process and self._process.is_alive else None

    async def admit(self, constraint: Constraint, tenant: bytes = b"") -> None:
        """Raises InvalidRequest for what can't be served, Overloaded when too many wait for their turn, Unavailable when the
        process ended meanwhile."""
        key = hashlib.sha256(b"\0".join([tenant, constraint.kind.encode(), constraint.text.encode()])).digest()
        if key not in self._outcomes:
            await self._try(key, constraint)
        self._outcomes.move_to_end(key)
        if reason := self._outcomes[key]:
            raise InvalidRequest(f"This form of an answer can't be enforced: {reason}.", param=constraint.param)

    async def _try(self, key: bytes, constraint: Constraint) -> None:
        """Once for all who ask at the same time, and to its end even when they leave."""
        trial = self._trials.get(key)
        if trial is None:
            if len(self._trials) >= MAX_WAITING:
                raise Overloaded("too many schemas and grammars wait to be compiled", retry_after_s=1)
            trial = self._trials[key] = asyncio.create_task(self._outcome(constraint))
            trial.add_done_callback(lambda _: self._trials.pop(key))
        self._outcomes[key] = await asyncio.shield(trial)
        while len(self._outcomes) > MAX_REMEMBERED:
            self._outcomes.popitem(last=False)

    async def _outcome(self, constraint: Constraint) -> str | None:
        async with self._room:
            process = await self._running()
            return await process.verdict(constraint)

    async def _running(self) -> _Process:
        async with self._starting:
            if self._process is None or not self._process.is_alive:
                self._process = await _Process.start(self._directory)
            return self._process

    async def close(self) -> None:
        if self._process:
            await self._process.close()


class _Process:
    """The other end of `trial.main`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._asked: dict[int, asyncio.Future[str | None]] = {}
        self._number = 0
        self._has_ended = False
        self._listener = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, directory: Path) -> _Process:
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "deployments.engine.trial", str(directory)],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # the library's complaints repeat what callers sent
            env=os.environ | {"PYTHONPATH": _import_path(), "TOKENIZERS_PARALLELISM": "false"},
        )
        assert process.stdout
        try:
            async with asyncio.timeout(START_S):
                await _read(process.stdout)
        except (TimeoutError, asyncio.IncompleteReadError):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            raise Unavailable("the process that compiles schemas and grammars doesn't start", retry_after_s=5) from None
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return not self._has_ended

    async def verdict(self, constraint: Constraint) -> str | None:
        """Why this can't be served, or None. A process that doesn't answer is ended."""
        assert self._process.stdin
        self._number += 1
        number = self._number
        answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        body = json.dumps({"id": number, "kind": constraint.kind, "text": constraint.text}).encode()
        self._process.stdin.write(LENGTH.pack(len(body)) + body)
        try:
            async with asyncio.timeout(2 * WALL_S):
                return await answer
        except TimeoutError:
            self._has_ended = True
            self.kill()
            raise Unavailable("the process that compiles schemas and grammars doesn't answer", retry_after_s=5) from None
        finally:
            del self._asked[number]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)

    async def close(self) -> None:
        self.kill()
        await self._listener
        if self._process.stdin:
            self._process.stdin.close()

    async def _listen(self) -> None:
        assert self._process.stdout
        try:
            while True:
                report = await _read(self._process.stdout)
                answer = self._asked.get(report["id"])
                if answer and not answer.done():
                    answer.set_result(report["reason"])
        except asyncio.IncompleteReadError:
            self._has_ended = True
            for answer in self._asked.values():
                if not answer.done():
                    answer.set_exception(Unavailable("the process that compiles schemas and grammars ended", retry_after_s=1))
            await self._process.wait()


async def _read(stream: asyncio.StreamReader) -> dict[str, Any]:
    (length,) = LENGTH.unpack(await stream.readexactly(LENGTH.size))
    assert length <= 6 * MAX_WORDS + 256, "a verdict is short"
    found: dict[str, Any] = json.loads(await stream.readexactly(length))
    return found


def _import_path() -> str:
    """Where this package is imported from comes first."""
    root = str(Path(deployments.__path__[0]).parent)
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
