"""Constraints are tried out in another process, which may be killed at any time."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.errors import InvalidRequest, Overloaded, Unavailable
from cluster.types import Constraint
from deployments import admission
from deployments.admission import Admission
from deployments.engine import schemas, trial
from tests.deployments.engine import texts
from tests.deployments.engine.forms import CONSTRAINTS, HOSTILE_CONSTRAINTS, HOSTILE_SCHEMAS, SCHEMAS

DEADLINE_S = trial.WALL_S + 4
"""On a machine that does other things too. What a trial takes of the CPU has a bound of its own, which the kernel keeps."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts.byte_level(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def gate(directory: Path) -> AsyncIterator[Admission]:
    gate = Admission(directory)
    yield gate
    await gate.close()


def of(schema: Any) -> Constraint:
    return Constraint("json_schema", schemas.admit(schema, strict=False, param="p"), "p")


async def outcome(gate: Admission, constraint: Constraint) -> str:
    try:
        async with asyncio.timeout(DEADLINE_S):
            await gate.admit(constraint)
    except InvalidRequest as error:
        return f"{error.param}: {error.message}"
    return ""


async def test_ordinary_ones_are_taken(gate: Admission) -> None:
    asked = [*map(of, SCHEMAS.values()), *(constraint for constraint, _ in CONSTRAINTS.values()), Constraint("json_object")]
    assert [await outcome(gate, constraint) for constraint in asked] == [""] * len(asked)


async def test_hostile_ones_are_refused_in_time(gate: Admission) -> None:
    """By the walk over the schema or by the trial, and never by an error of ours."""
    for name, schema in HOSTILE_SCHEMAS.items():
        try:
            constraint = of(schema)
        except InvalidRequest:
            continue
        assert await outcome(gate, constraint), name
    refused = {name for name, constraint in HOSTILE_CONSTRAINTS.items() if await outcome(gate, constraint)}
    assert refused >= {
        "nested counts",
        "intersection",
        "endless",
        "no end",
        "deep parentheses",
        "exponential rules",
        "a file",
        "empty",
    }
    assert gate.pid, "no constraint ended the process itself"
    async with asyncio.timeout(10):  # a child says its verdict just before it ends
        while psutil.Process(gate.pid).children():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.02)


async def test_a_reason_names_what_is_wrong(gate: Admission) -> None:
    assert "look-around" in await outcome(gate, Constraint("regex", "(?=a)b", "guided_regex"))
    assert (await outcome(gate, Constraint("regex", "(", "guided_regex"))).startswith("guided_regex: ")
    assert "nobody" in await outcome(gate, Constraint("grammar", "start: nobody"))
    assert "no answer" in await outcome(gate, of({"$ref": "#"}))
    assert "oneOf" in await outcome(gate, of({"oneOf": [{"type": "string"}, {"type": "string", "minLength": 3}]}))


async def test_an_outcome_is_remembered_for_its_tenant(gate: Admission, monkeypatch: pytest.MonkeyPatch) -> None:
    constraint = of(SCHEMAS["flat"])
    await gate.admit(constraint, b"a")
    await gate.admit(constraint, b"b")
    os.kill(gate.pid or 0, signal.SIGSTOP)
    await gate.admit(constraint, b"a")
    monkeypatch.setattr(admission, "WALL_S", 0.1)
    with pytest.raises(Unavailable):
        await gate.admit(constraint, b"c")


async def test_what_takes_too_long_is_ended_by_the_kernel(directory: Path) -> None:
    """A child that does nothing but work, in place of a library that forgets its own limits."""
    assert await told(directory, "while True: pass") == trial.TOO_SLOW


async def test_what_sleeps_too_long_is_killed(directory: Path) -> None:
    assert await told(directory, "import time; time.sleep(60)", wall_s=0.3) == trial.TOO_SLOW


async def test_what_takes_too_much_memory_is_refused(directory: Path) -> None:
    assert await told(directory, "bytearray(1 << 30)") == trial.TOO_LARGE


async def told(directory: Path, instead: str, wall_s: float = trial.WALL_S) -> str:
    """What the process says when this runs in the place of the library."""
    program = (
        "import sys\nfrom deployments.engine import trial\n"
        f"trial.WALL_S = {wall_s}\n"
        f"def compiled(*_):\n    {instead}\n    raise SystemError\n"
        "trial.compiled = compiled\ntrial.main(sys.argv[1])"
    )
    process = await asyncio.create_subprocess_exec(
        *[os.sys.executable, "-c", program, str(directory)],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(trial.__file__).parents[2])},
    )
    assert process.stdout
    await admission._read(process.stdout)
    end = admission._Process(process)
    began = time.monotonic()
    reason = await end.verdict(Constraint("json_object"))
    assert time.monotonic() - began < DEADLINE_S
    assert await end.verdict(Constraint("json_object")) == reason, "and the next one is answered too"
    await end.close()
    return str(reason)


async def test_a_killed_process_is_replaced(gate: Admission) -> None:
    await gate.admit(Constraint("regex", "a"))
    first = gate.pid
    os.kill(first or 0, signal.SIGSTOP)
    waiting = asyncio.create_task(gate.admit(Constraint("regex", "b")))
    await asyncio.sleep(0.1)
    os.kill(first or 0, signal.SIGKILL)
    with pytest.raises(Unavailable):
        await waiting
    await gate.admit(Constraint("regex", "b"))
    assert gate.pid not in (None, first)


async def test_it_ends_with_who_started_it(gate: Admission) -> None:
    await gate.admit(Constraint("regex", "a"))
    process = psutil.Process(gate.pid)
    assert gate._process
    assert gate._process._process.stdin
    gate._process._process.stdin.close()  # as the kernel does for a replica that was killed
    await asyncio.to_thread(process.wait, 5)


async def test_no_more_wait_than_there_is_room_for(gate: Admission, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_WAITING", 3)
    asked = [gate.admit(Constraint("regex", f"a{number}")) for number in range(5)]
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(result) for result in results] == [type(None)] * 3 + [Overloaded] * 2


async def test_no_more_is_remembered_than_there_is_room_for(gate: Admission, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_REMEMBERED", 4)
    for number in range(6):
        await gate.admit(Constraint("regex", f"a{number}"))
    assert len(gate._outcomes) == 4
