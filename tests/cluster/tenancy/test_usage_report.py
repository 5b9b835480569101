from __future__ import annotations

import pytest

from cluster.errors import InvalidRequest
from cluster.store import Store
from cluster.tenancy.ledger import Ledger
from cluster.tenancy.metered import Metered
from cluster.tenancy.usage_report import Question, usage
from tests.cluster.tenancy.accounts import PRICES, caller
from tests.cluster.tenancy.conftest import Clock


def test_sums_by_bucket_and_group(ledger: Ledger, either_store: Store, clock: Clock) -> None:
    ledger.prices.publish("default", PRICES)
    start = clock.now
    for number in range(12):
        project = "web" if number % 3 else "api"
        ledger.reserve(caller(project, f"key-{project}"), f"r{number}", "chat", 1000)
        ledger.settle(f"r{number}", Metered(output_tokens=number), "length" if number == 11 else "finished")
        clock.now += 1799.5
    hourly = usage(either_store, Question(start, start + 6 * 3600, 3600, organization="acme"))
    assert [each.metered.requests for each in hourly] == [3, 2, 2, 2, 2, 1]
    assert [each.begins for each in hourly] == [int(start) + 3600 * n for n in range(6)]
    by = usage(either_store, Question(start, start + 86_400, by=("project", "outcome")))
    assert [(dict(each.group), each.metered.output_tokens, each.amount) for each in by] == [
        ({"project": "api", "outcome": "finished"}, 18, 90),
        ({"project": "web", "outcome": "finished"}, 37, 185),
        ({"project": "web", "outcome": "length"}, 11, 55),
    ]
    only = usage(either_store, Question(start, start + 86_400, only={"project": ["api", "nobody"]}))
    assert [each.metered.requests for each in only] == [4]
    assert usage(either_store, Question(start, start + 86_400, organization="umbrella")) == []


@pytest.mark.parametrize("asked", [Question(2, 1), Question(0, 1e9, 60), Question(0, 1, by=("request_id",))])  # type: ignore[arg-type]
def test_what_can_not_be_asked_is_refused(either_store: Store, asked: Question) -> None:
    with pytest.raises(InvalidRequest):
        usage(either_store, asked)
