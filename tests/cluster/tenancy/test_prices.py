from __future__ import annotations

import pytest

from cluster.errors import Conflict, InvalidRequest, NotFound
from cluster.store import Store
from cluster.tenancy.books import Settled
from cluster.tenancy.budgets import Budgets
from cluster.tenancy.ledger import Ledger
from cluster.tenancy.metered import Metered
from cluster.tenancy.prices import Prices, parse
from cluster.tenancy.rating import PriceList
from cluster.tenancy.reconcile import problems
from tests.cluster.tenancy.accounts import PRICES, caller
from tests.cluster.tenancy.conftest import Clock

DEARER = PriceList.model_validate({"charges": [{"meter": "output_tokens", "price": "50", "per": 1_000_000}]})
TEN = Metered(output_tokens=10)


def test_a_new_version_counts_for_what_is_reserved_from_then_on(ledger: Ledger, either_store: Store, clock: Clock) -> None:
    ledger.prices.publish("default", PRICES)
    ledger.prices.publish("default", DEARER, clock.now + 100)
    ledger.reserve(caller(), "before", "chat", TEN)
    clock.now += 100
    ledger.reserve(caller(), "after", "chat", TEN)
    assert ledger.settle("before", TEN, "finished") == Settled(50, first=True)
    assert ledger.settle("after", TEN, "finished") == Settled(500, first=True)
    assert problems(either_store) == []


def test_prices_never_reach_back(ledger: Ledger, clock: Clock) -> None:
    with pytest.raises(InvalidRequest, match="past"):
        ledger.prices.publish("default", PRICES, clock.now - 1)
    ledger.prices.publish("default", PRICES, clock.now + 50)
    with pytest.raises(Conflict, match="later"):
        ledger.prices.publish("default", PRICES, clock.now + 49)
    with pytest.raises(InvalidRequest, match="one currency"):
        ledger.prices.publish("swiss", PRICES.model_copy(update={"currency": "CHF"}))
    with pytest.raises(InvalidRequest, match="name"):
        ledger.prices.publish("../x", PRICES)


def test_without_prices_everything_is_counted_and_free(ledger: Ledger, either_store: Store) -> None:
    Budgets(either_store).set("organization", "acme", "total", 0)
    ledger.reserve(caller(), "r1", "chat", TEN)
    assert ledger.settle("r1", TEN, "finished") == Settled(0, first=True)
    assert problems(either_store) == []


def test_an_organization_is_on_its_plan_from_the_change_on(ledger: Ledger, clock: Clock) -> None:
    ledger.prices.publish("default", PRICES)
    ledger.prices.publish("gold", DEARER)
    with pytest.raises(NotFound):
        ledger.prices.subscribe("acme", "silver")
    clock.now += 1
    ledger.prices.subscribe("acme", "gold")
    assert ledger.prices.at("acme").plan == "gold"
    assert ledger.prices.at("acme", clock.now - 1).plan == "default"
    assert ledger.prices.at("umbrella").plan == "default"
    assert ledger.worst(caller(), "chat", TEN) == 500


def test_what_is_published_is_read_again(either_store: Store, clock: Clock) -> None:
    Prices(either_store, clock).publish("default", PRICES)
    [version] = Prices(either_store, clock).list()
    assert version.prices == PRICES
    assert Prices(either_store, clock).at("acme") == version


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "prices"),
        ('{"charges": [{"meter": "words", "price": "1"}]}', "charges.0"),
        ('{"currency": "euro"}', "currency"),
        ('{"charges": [{"meter": "requests", "price": 0.1}]}', "charges.0.price"),
        ('{"discount": "5"}', "discount"),
        ('{"charges": [{"meter": "requests", "price": "1"}, {"meter": "requests", "price": "2"}]}', "same meter"),
    ],
)
def test_an_error_in_a_price_list_is_named(text: str, where: str) -> None:
    with pytest.raises(InvalidRequest, match=where):
        parse(text)
