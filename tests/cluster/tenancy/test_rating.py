from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.tenancy.metered import METERS, Metered, billable
from cluster.tenancy.rating import Booked, Counter, PriceList, at_most, count, rate, replay
from cluster.types import Usage
from tests.cluster.tenancy.test_charges import charges

QUANTITY = st.integers(0, 100_000)
METERED = st.builds(Metered, **dict.fromkeys(METERS, QUANTITY))
MODELS = st.sampled_from(["chat", "chat:support", "code"])


@st.composite
def price_lists(draw: st.DrawFn) -> PriceList:
    made = [charge.model_copy(update={"model": draw(st.sampled_from(["*", "chat"]))}) for charge in draw(st.lists(charges()))]
    return PriceList(charges=tuple({charge.key: charge for charge in made}.values()))


@given(price_lists(), st.lists(st.tuples(MODELS, METERED), max_size=8))
def test_no_request_passes_what_was_reserved_for_it(prices: PriceList, requests: list[tuple[str, Metered]]) -> None:
    counters: dict[Counter, int] = {}
    for model, metered in requests:
        prompt = metered.input_tokens + metered.cached_tokens  # before the work nobody knows what is cached
        bound = Metered(**{name: getattr(metered, name) for name in METERS} | {"input_tokens": prompt, "cached_tokens": 0})
        items = rate(prices, counters, model, metered, 0.0)
        assert sum(item.amount for item in items) <= at_most(prices, model, bound)
        count(counters, items)


@given(price_lists(), st.lists(st.tuples(MODELS, METERED, st.floats(0, 1e8)), max_size=8))
def test_a_replay_gives_the_same_again(prices: PriceList, requests: list[tuple[str, Metered, float]]) -> None:
    booked = [Booked(1, *request) for request in requests]
    counters: dict[Counter, int] = {}
    first = []
    for model, metered, at in requests:
        first.append(rate(prices, counters, model, metered, at))
        count(counters, first[-1])
    assert list(replay(booked, {1: prices})) == first


def listed(*charges: dict[str, str]) -> PriceList:
    return PriceList.model_validate({"charges": charges})


def test_a_models_own_price_counts_before_its_bases_and_that_for_all() -> None:
    prices = listed({"meter": "requests", "price": "1"}, {"meter": "requests", "model": "chat", "price": "2"})
    amounts = [rate(prices, {}, model, Metered(), 0.0)[0].amount for model in ("code", "chat", "chat:support")]
    assert amounts == [1_000_000, 2_000_000, 2_000_000]


def test_cached_input_without_a_price_of_its_own_is_input() -> None:
    metered = Metered.of(Usage(prompt_tokens=100, completion_tokens=0, cached_tokens=60))
    plain, cheaper = listed({"meter": "input_tokens", "price": "1"}), {"meter": "cached_tokens", "price": "0.5"}
    assert sum(item.amount for item in rate(plain, {}, "chat", metered, 0.0)) == 100_000_000
    both = listed({"meter": "input_tokens", "price": "1"}, cheaper)
    assert sum(item.amount for item in rate(both, {}, "chat", metered, 0.0)) == 70_000_000


def test_a_new_window_begins_at_nothing() -> None:
    prices = PriceList.model_validate(
        {"charges": [{"meter": "requests", "window": "day", "tiers": [{"up_to": 1, "price": "0"}, {"price": "1"}]}]}
    )
    days = [Booked(1, "chat", Metered(), at) for at in (0.0, 1.0, 86_400.0, 86_401.0)]
    assert [items[0].amount for items in replay(days, {1: prices})] == [0, 1_000_000, 0, 1_000_000]


def test_what_failed_by_our_fault_before_it_answered_costs_nothing() -> None:
    used, silent = Metered(input_tokens=5, output_tokens=1), Metered(input_tokens=5)
    assert billable(used, "replica_lost") == used
    assert billable(silent, "replica_lost") == Metered(requests=0)
    assert billable(silent, "client_gone") == silent
