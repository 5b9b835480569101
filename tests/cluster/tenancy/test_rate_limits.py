from __future__ import annotations

import pytest

from cluster.errors import InvalidRequest
from cluster.store import Store
from cluster.tenancy.model_permissions import ModelPermissions, Permission, model_permissions
from cluster.tenancy.rate_limits import MOST, RateLimit, RateLimits, rate_limits
from cluster.tenancy.rules import Rules, stored


@pytest.fixture
def store(migrated: Store) -> Store:
    with migrated.begin() as connection:
        for table in (rate_limits, model_permissions):
            connection.execute(table.delete())
    return migrated


def test_rows_are_kept_by_project_model_and_key(store: Store) -> None:
    rates = RateLimits(store)
    rows = [RateLimit("acme", requests=5), RateLimit("acme", "chat", tokens=7), RateLimit("acme", "chat", "k1", streams=0)]
    for row in [*rows, RateLimit("rival", requests=9)]:
        assert rates.put(row) is None
    assert rates.of("acme") == tuple(rows)
    assert rates.put(RateLimit("acme", requests=6)) == rows[0]
    assert rates.put(RateLimit("acme", "chat")) == rows[1]  # bounds nothing: it is taken away
    assert rates.of("acme") == (RateLimit("acme", requests=6), rows[2])
    assert rates.of("nobody") == ()


@pytest.mark.parametrize(
    "row",
    [
        RateLimit("../acme", requests=1),
        RateLimit("acme", "a/b", requests=1),
        RateLimit("acme", "chat", "k'", requests=1),
        RateLimit("acme", requests=-1),
        RateLimit("acme", tokens=MOST),
    ],
)
def test_what_is_no_limit_is_refused(store: Store, row: RateLimit) -> None:
    with pytest.raises(InvalidRequest):
        RateLimits(store).put(row)


def test_permissions_are_kept_and_taken_away(store: Store) -> None:
    permissions = ModelPermissions(store)
    assert permissions.of("acme") is None
    assert permissions.put("acme", "allow_list", ["chat", "chat", "gut:☺"]) == Permission("allow_list", ("chat", "gut:☺"))
    assert permissions.put("acme", "deny_list", []) == permissions.of("acme") == Permission("deny_list", ())
    assert [permissions.delete("acme") for _ in range(2)] == [True, False]


def test_the_default_bounds_projects_without_a_row_of_their_own(store: Store) -> None:
    rates = RateLimits(store)
    read = stored(rates, ModelPermissions(store), RateLimit("", requests=3))
    assert read("acme") == Rules((RateLimit("acme", requests=3),))
    rates.put(RateLimit("acme", "chat", tokens=5))
    assert read("acme").limits == (RateLimit("acme", "chat", tokens=5), RateLimit("acme", requests=3))
    rates.put(RateLimit("acme", requests=1000))
    assert read("acme").limits == (RateLimit("acme", requests=1000), RateLimit("acme", "chat", tokens=5))
    assert stored(rates, ModelPermissions(store), RateLimit(""))("rival") == Rules()


def test_other_tables_keep_their_rows_through_going_down_and_up(store: Store) -> None:
    from cluster.store import deployments

    row = {"name": "a", "model": "m", "tp": 1, "dtype": "float32", "min_replicas": 1, "max_replicas": 1, "created_at": 1.0}
    with store.begin() as connection:
        connection.execute(deployments.insert().values(row))
    RateLimits(store).put(RateLimit("acme", requests=5))
    ModelPermissions(store).put("acme", "allow_list", ["chat"])
    store.downgrade("0004")
    store.migrate()
    with store.begin() as connection:
        assert connection.execute(deployments.select()).one().name == "a"
        connection.execute(deployments.delete())
    assert RateLimits(store).of("acme") == ()
    assert ModelPermissions(store).of("acme") is None
    assert RateLimits(store).put(RateLimit("acme", requests=5)) is None
