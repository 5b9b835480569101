"""Tries constraints out before anybody serves them: `python -m deployments.engine.trial DIRECTORY`.

This process reads a model's vocabulary once and then forks a child for every constraint that comes in. The child has so much CPU
time and so much memory; what exceeds them is ended by the kernel, and nothing else has to be trusted: neither the library to keep
its own limits nor the constraint to be harmless. Frames on stdin and stdout are a length and JSON; the end of stdin is the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.types import Constraint
from deployments.engine.structured import compiled, limits, vocabulary
from deployments.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CPU_S = 0.5
WALL_S = 4.0
"""For a machine that has no time for the child."""
MEMORY_BYTES = 256 << 20
"""On top of what the vocabulary takes."""
STEPS = 64
"""Tokens of an answer that are tried."""
STEP_S = 0.05
MAX_WORDS = 600
"""Characters of a reason; with its frame it fits into one write that others' can't cut in two."""
LENGTH = struct.Struct("<I")
TOO_SLOW = "compiling or following it takes too long; make it smaller: fewer alternatives, smaller bounds, less nesting"
TOO_LARGE = "compiling it takes too much memory; make it smaller: fewer alternatives, smaller bounds, less nesting"
NO_ANSWER = "no answer can have this form"


@dataclass(slots=True)
class _Child:
    number: int
    pid: int
    ends_at: float


def main(directory: str) -> None:
    tokens = vocabulary(Tokenizer.load(Path(directory)))
    _say({"ready": os.getpid()})
    children: dict[int, _Child] = {}  # by a descriptor of the process
    while True:
        ready, _, _ = select.select([sys.stdin.fileno(), *children], [], [], 0.1 if children else None)
        for found in ready:
            if found != sys.stdin.fileno():
                _bury(children.pop(found), found)
            elif (asked := _read()) is None:
                return
            else:
                child = _fork(asked, tokens)
                children[os.pidfd_open(child.pid)] = child
        for child in children.values():
            if time.monotonic() > child.ends_at:
                os.kill(child.pid, signal.SIGKILL)


def verdict(constraint: Constraint, tokens: LLTokenizer) -> str | None:
    """Why this can't be served, or None."""
    try:
        matcher = compiled(constraint, tokens, limits())
    except ValueError as error:
        return _reason(str(error))
    if matcher.is_error():
        return _reason(matcher.get_error())
    return _walk(matcher)


def _walk(matcher: LLMatcher) -> str | None:
    """The beginning of an answer by dice: what each of its steps will cost the ranks is known before the first of them pays."""
    dice = np.random.default_rng(0)
    for _ in range(STEPS):
        began = time.process_time()
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"))
        if matcher.is_error() or not len(allowed):
            return NO_ANSWER if matcher.get_error().startswith("NoExtension") else _reason(matcher.get_error())
        taken = matcher.consume_token(int(dice.choice(allowed)))
        if time.process_time() - began > STEP_S:
            return TOO_SLOW
        if not taken:
            return _reason(matcher.get_error())
        if matcher.is_stopped():
            return None
    return None


def _fork(asked: dict[str, Any], tokens: LLTokenizer) -> _Child:
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):  # a child never goes on to be a second parent
            _limit()
            _say({"id": asked["id"], "reason": verdict(Constraint(asked["kind"], asked["text"]), tokens)})
            code = 0
        os._exit(code)
    return _Child(asked["id"], pid, time.monotonic() + WALL_S)


def _limit() -> None:
    """The kernel's own action ends the process: nothing of ours has to run for it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.setitimer(signal.ITIMER_PROF, CPU_S)


def _bury(child: _Child, descriptor: int) -> None:
    """A child that was ended says nothing itself."""
    os.close(descriptor)
    _, status = os.waitpid(child.pid, 0)
    if status:
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGKILL)
        _say({"id": child.number, "reason": TOO_SLOW if late else TOO_LARGE})


def _reason(error: str) -> str:
    """The library's words, without its pictures of our state."""
    lines = [line.strip() for line in error.splitlines() if line.strip() and "non-verbose" not in line]
    return " ".join(lines)[:MAX_WORDS] or "it can't be compiled"


def _read() -> dict[str, Any] | None:
    head = _exactly(LENGTH.size)
    if head is None or (body := _exactly(LENGTH.unpack(head)[0])) is None:
        return None
    found: dict[str, Any] = json.loads(body)
    return found


def _exactly(size: int) -> bytes | None:
    parts = b""
    while len(parts) < size:
        part = os.read(sys.stdin.fileno(), size - len(parts))
        if not part:
            return None
        parts += part
    return parts


def _say(report: dict[str, Any]) -> None:
    body = json.dumps(report).encode()
    with contextlib.suppress(BrokenPipeError):  # nobody is left to tell
        os.write(sys.stdout.fileno(), LENGTH.pack(len(body)) + body)


if __name__ == "__main__":
    main(sys.argv[1])
