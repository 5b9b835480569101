from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cluster.store import Store
from cluster.tenancy import denials as module
from cluster.tenancy.audit import Audit
from cluster.tenancy.chain import Actor, Record
from cluster.tenancy.denials import Denial, Denials
from tests.cluster.tenancy.conftest import Clock

WRONG = Denial(Actor("api_key", "unknown", address="10.0.0.1"), "invalid_api_key", "/v1/models", 401)


@pytest.fixture
def audit(migrated: Store, clock: Clock) -> Audit:
    return Audit(migrated, bytes(32), clock)


@pytest.fixture
def denials(audit: Audit, clock: Clock) -> Denials:
    return Denials(audit, clock)


def since(audit: Audit, number: int) -> list[Record]:
    return [record for record in audit.records() if record.number > number]


def counts(records: list[Record]) -> list[int]:
    return [json.loads(record.after or "{}")["count"] for record in records]


def test_the_first_is_written_at_once_and_what_repeats_once_a_minute(denials: Denials, audit: Audit, clock: Clock) -> None:
    start = audit.head().number
    denials.note(WRONG, "req_1")
    assert denials.write() == 1
    for _ in range(1000):
        clock.now += 0.05
        denials.note(WRONG)
        assert denials.write() == 0
    clock.now += 11
    assert denials.write() == 1
    records = since(audit, start)
    assert counts(records) == [1, 1000]
    assert (records[0].action, records[0].request_id, records[0].target) == ("login.failed", "req_1", "/v1/models")
    clock.now += 60
    assert denials.write() == 0
    denials.note(WRONG)
    assert denials.write() == 1


def test_every_denial_is_counted_however_many_kinds_there_are(
    denials: Denials, audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_KINDS", 5)
    start = audit.head().number
    for number in range(100):
        denials.note(replace(WRONG, actor=Actor("api_key", f"key_{number}")))
    assert denials.write() == 6
    assert sum(counts(since(audit, start))) == 100


def test_what_could_not_be_written_is_written_later(denials: Denials, audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    start = audit.head().number
    denials.note(WRONG)
    denials.note(replace(WRONG, status=403, code="insufficient_permissions"))
    with monkeypatch.context() as broken:
        broken.setattr(Audit, "_append", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            denials.write()
    denials.note(WRONG)
    assert denials.write() == 2
    records = since(audit, start)
    assert sorted(counts(records)) == [1, 2]
    assert {record.action for record in records} == {"login.failed", "access.denied"}


def test_at_the_end_everything_is_written(denials: Denials, audit: Audit) -> None:
    denials.note(WRONG)
    denials.write()
    denials.note(WRONG)
    assert denials.write() == 0
    assert denials.write(everything=True) == 1
