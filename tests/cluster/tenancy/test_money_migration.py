"""Revisions 0009 and 0010 up and down, with data, on both databases."""

from __future__ import annotations

import sqlalchemy as sa

from cluster.store import Store
from cluster.tenancy.budgets import scope
from cluster.tenancy.ledger import Ledger
from cluster.tenancy.reconcile import problems
from cluster.tenancy.spend_alerts import SpendAlerts, Wish
from cluster.tenancy.usage_report import Question, usage
from tests.cluster.tenancy.accounts import PRICES, caller

EVER = Question(0, 1e11, by=("operation",))


def test_usage_from_before_there_were_operations_is_of_completions(ledger: Ledger, either_store: Store) -> None:
    ledger.prices.publish("default", PRICES)
    ledger.reserve(caller(), "open", "chat", 10, "rerank")
    ledger.reserve(caller(), "closed", "chat", 10, "embeddings")
    ledger.settle("closed", None, "finished")
    alerts = SpendAlerts(either_store, ledger._clock)
    alerts.create("acme", scope("project", "web"), Wish(0, "month", ("a@example.org",)))
    assert len(alerts.evaluate()) == 1
    assert [dict(each.group) for each in usage(either_store, EVER)] == [{"operation": "embeddings"}]
    either_store.downgrade("0008")
    with either_store.read() as connection:
        assert not {"spend_alerts", "passed_alerts"} & set(sa.inspect(connection).get_table_names())
    either_store.migrate()
    assert alerts.list(scope("project", "web")) == []
    fresh = Ledger(either_store, ledger._clock)
    fresh.settle("open", None, "finished")
    assert [(dict(each.group), each.metered.requests) for each in usage(either_store, EVER)] == [({"operation": "completions"}, 2)]
    assert problems(either_store) == []
