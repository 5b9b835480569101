"""Constraints are compiled beside rank 0's loop."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cluster.types import Constraint
from deployments.engine.compiling import Compiling
from deployments.engine.structured import MAX_KEPT, MAX_USES, Grammars
from tests.deployments.engine import texts
from tests.deployments.engine.arithmetic import request

CONSTRAINT = Constraint("regex", "a+")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts.byte_level(tmp_path_factory.mktemp("model"))


def ready(compiling: Compiling) -> list[int]:
    end = time.monotonic() + 20
    while not (found := compiling.ready()):
        assert time.monotonic() < end, "it was never compiled"
        time.sleep(0.002)
    return [request.id for request in found]


def test_a_request_waits_for_its_constraint_and_the_next_one_does_not(directory: Path) -> None:
    grammars = Grammars(directory)
    compiling = Compiling(grammars)
    assert not compiling.add(request(1, [1])), "there is nothing to wait for"
    assert compiling.add(request(2, [1], constraint=CONSTRAINT))
    assert len(compiling) == 1
    assert ready(compiling) == [2]
    assert not compiling.add(request(3, [1], constraint=CONSTRAINT))
    assert not grammars.matcher(CONSTRAINT).has_failed
    compiling.close()


def test_who_leaves_meanwhile_is_forgotten(directory: Path) -> None:
    compiling = Compiling(Grammars(directory))
    compiling.add(request(1, [1], constraint=CONSTRAINT))
    compiling.add(request(2, [1], constraint=Constraint("regex", "b")))
    assert compiling.forget(1)
    assert not compiling.forget(1)
    assert ready(compiling) == [2]
    assert len(compiling) == 0
    compiling.close()


def test_what_cannot_be_compiled_comes_out_too(directory: Path) -> None:
    grammars = Grammars(directory)
    compiling, bad = Compiling(grammars), Constraint("json_schema", "no JSON")
    compiling.add(request(1, [1], constraint=bad))
    assert ready(compiling) == [1]
    assert grammars.matcher(bad).has_failed
    compiling.close()


def test_few_constraints_are_kept_and_none_for_ever(directory: Path) -> None:
    grammars = Grammars(directory)
    for _ in range(MAX_USES):
        grammars.matcher(CONSTRAINT)
    assert not grammars.has(CONSTRAINT), "it is compiled anew, so that its lexer's table is empty again"
    for number in range(MAX_KEPT + 3):
        grammars.matcher(Constraint("regex", f"a{number}"))
    assert sum(grammars.has(Constraint("regex", f"a{number}")) for number in range(MAX_KEPT + 3)) == MAX_KEPT
