from __future__ import annotations

import sqlalchemy as sa

from cluster.store import Store
from cluster.tenancy.budgets import Budgets
from cluster.tenancy.ledger import Ledger
from cluster.tenancy.reconcile import problems
from tests.cluster.tenancy.accounts import PRICES, caller


def test_the_schema_goes_down_with_data_in_it_and_up_again(ledger: Ledger, either_store: Store) -> None:
    ledger.prices.publish("default", PRICES)
    Budgets(either_store).set("project", "web", "day", 10_000)
    for again in range(2):
        fresh = Ledger(either_store, ledger._clock)
        fresh.reserve(caller(), "r1", "chat", 10)
        fresh.settle("r1", None, "finished")
        fresh.reserve(caller(), "r2", "chat", 10)
        assert problems(either_store) == []
        if not again:
            either_store.downgrade("0004")
            with either_store.read() as connection:
                names = set(sa.inspect(connection).get_table_names())
            assert {"api_keys", "deployments", "adapters"} <= names
            assert not names & {"postings", "entries", "holds", "balances", "invoices"}
            either_store.migrate()
