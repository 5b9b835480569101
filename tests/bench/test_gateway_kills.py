"""The short form of `bench/gateway_kills.py` and `bench/slow_streams.py`, and proof that each of their checks can fail."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import slow_streams
from bench.callers import Attempt, outcomes
from bench.gateway_kills import Place, Report, check, run, table
from bench.gateways import Execution, Journal, executions
from cluster.settings import Settings
from cluster.tenancy.budgets import Budgets
from cluster.tenancy.ledger import Ledger
from cluster.tenancy.metered import Metered, Outcome
from cluster.types import Principal
from tests.cluster.conftest import postgres_url  # noqa: F401 - a fixture


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "gateways"), [("sqlite", 1), ("postgres", 3)])
def test_killed_gateways_lose_nothing_and_double_nothing(
    tmp_path: Path, kind: str, gateways: int, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("postgres_url") if kind == "postgres" else None
    settings = Settings(home=tmp_path, database_url=url, gateway={"replicas": gateways})
    report = run(settings, gateways, callers=12, kills=6, pace_s=0.8, seed=random.randrange(1000))
    assert report.is_clean, [report.lost, report.doubled, report.wrong]
    assert report.kills == 6
    assert report.billed["lost"] > 0, "nobody was killed at work"
    assert report.ends["answered whole"] > 20
    assert report.ends["refused: insufficient_quota"] > 0, "the budget was never near its end"


@pytest.mark.slow
def test_slow_streams_come_whole(tmp_path: Path) -> None:
    result = slow_streams.measure(Settings(home=tmp_path), streams=60, seconds=12, pause_s=0.2)
    assert result.is_clean, result
    assert result.memory is not None
    assert 0 < result.cpu < 2
    assert "| dropped | 0 |" in slow_streams.table(result).markdown()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(Settings(home=tmp_path))
    yield place
    place.store.close()


def booked(place: Place, request_id: str, tokens: int, outcome: Outcome = "finished") -> None:
    ledger = Ledger(place.store)
    ledger.reserve(Principal(place.projects[0], "k1", frozenset(), "default"), request_id, "echo", Metered(output_tokens=100))
    ledger.settle(request_id, Metered(input_tokens=7, output_tokens=tokens), outcome)


def whole(nonce: str, request_id: str, tokens: int, *, has_key: bool = False) -> Attempt:
    now = time.monotonic()
    return Attempt(nonce, has_key, False, now, 200, request_id, tokens, (7, tokens), whole=True, ended=now)


def ran(nonce: str, request_id: str, said: int, began: float = 0.0) -> dict[str, Execution]:
    return {request_id: Execution(nonce, request_id, began, said, ended=True)}


def found(place: Place, attempts: list[Attempt], done: dict[str, Execution]) -> Report:
    check(place, attempts, done, report := Report())
    return report


def test_what_is_right_is_called_right(place: Place) -> None:
    booked(place, "r1", 5)
    booked(place, "r2", 3, "lost")
    report = found(place, [whole("n1", "r1", 5)], ran("n1", "r1", 5) | ran("n2", "r2", 4))
    assert report.is_clean, report
    assert ["lost, doubled, wrong", "0, 0, 0"] in table(report).lines


def test_an_answer_that_nobody_pays_is_lost(place: Place) -> None:
    assert len(found(place, [whole("n1", "r1", 5)], ran("n1", "r1", 5)).lost) == 2


def test_an_answer_billed_for_something_else_is_wrong(place: Place) -> None:
    booked(place, "r1", 4)
    [wrong] = found(place, [whole("n1", "r1", 5)], ran("n1", "r1", 5)).wrong
    assert "used (7, 5)" in wrong


def test_more_than_was_said_is_doubled(place: Place) -> None:
    booked(place, "r1", 9)
    booked(place, "r2", 9)
    assert len(found(place, [], ran("n1", "r1", 5)).doubled) == 2


def test_a_call_that_is_paid_or_run_again_is_doubled(place: Place) -> None:
    booked(place, "r1", 5)
    first = whole("n1", "r1", 5, has_key=True)
    booked(place, "r2", 5)
    both = ran("n1", "r1", 5) | ran("n1", "r2", 5, began=first.ended + 1)
    again = found(place, [first], both).doubled
    assert ["executed again after its answer" in what or "paid in full 2 times" in what for what in again] == [True, True]
    without = found(place, [whole("n1", "r1", 5), whole("n1", "r2", 5)], both).doubled
    assert any("no key and was executed 2 times" in what for what in without)
    assert any("two answers" in what for what in without)


def test_what_stays_reserved_and_a_passed_budget_are_wrong(place: Place) -> None:
    Ledger(place.store).reserve(Principal(place.projects[0], "k1", frozenset(), "default"), "r1", "echo", 50)
    Budgets(place.store).set("project", place.projects[0], "total", 49)
    wrong = found(place, [], {}).wrong
    assert any("still reserved" in what for what in wrong)
    assert any("50 held of 49" in what for what in wrong)


def test_the_journal_says_what_models_did(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    for words in (("began", "n1", "r1", 2.5), ("said", "r1"), ("began", "n2", "r2", 3), ("said", "r1"), ("ended", "r1")):
        journal.note(*words)
    assert executions(tmp_path / "journal") == {
        "r1": Execution("n1", "r1", 2.5, 2, ended=True),
        "r2": Execution("n2", "r2", 3.0, 0, ended=False),
    }


def test_ends_are_told_apart() -> None:
    unanswered, left, refused = (Attempt("n", False, False, 0.0) for _ in range(3))
    left.left, refused.status, refused.error = True, 503, "overloaded"
    broken = Attempt("n", False, True, 0.0, 200)
    assert outcomes([unanswered, left, refused, broken, whole("n", "r", 1)]) == {
        "unanswered": 1,
        "left": 1,
        "refused: overloaded": 1,
        "broken off": 1,
        "answered whole": 1,
    }
