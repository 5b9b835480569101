"""The arithmetic of fairness against what it says in words."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.fairness import CACHED, Account, Ledger, batch_part, prompt_cost, shares

WANTS = st.dictionaries(st.integers(0, 9), st.integers(0, 40), max_size=8)


def token_by_token(budget: int, wanted: dict[int, int]) -> list[int]:
    """Max-min fairness by its definition: one token at a time to whoever has least and wants more. The amounts, sorted."""
    given = dict.fromkeys(wanted, 0)
    while budget and (hungry := [key for key in wanted if given[key] < wanted[key]]):
        given[min(hungry, key=lambda key: given[key])] += 1
        budget -= 1
    return sorted(given.values())


@given(budget=st.integers(0, 120), wanted=WANTS)
def test_shares_are_those_of_giving_one_token_at_a_time(budget: int, wanted: dict[int, int]) -> None:
    given = shares(budget, wanted)
    assert given.keys() == wanted.keys()
    assert all(given[key] <= wanted[key] for key in wanted)
    assert sorted(given.values()) == token_by_token(budget, wanted)


@given(budget=st.integers(0, 5000), interactive=st.integers(0, 5000), batch=st.integers(0, 5000))
def test_batch_gets_what_is_left_and_a_twentieth_at_least(budget: int, interactive: int, batch: int) -> None:
    part = batch_part(budget, interactive, batch)
    assert 0 <= part <= min(budget, batch)
    assert part == batch or part >= budget // 20
    assert part == batch or part + interactive >= budget, "work is left undone"


def test_cached_tokens_cost_less() -> None:
    assert prompt_cost(100, 0) == 100
    assert prompt_cost(100, 90) == 10 + 90 * CACHED < 20


def test_newcomer_is_lifted_to_the_least_of_those_who_wait() -> None:
    ledger: Ledger[Account] = Ledger()
    poor, rich, newcomer = Account(served=50), Account(served=80), Account(served=3)
    ledger.begin(rich)
    ledger.resume(poor)
    ledger.begin(newcomer)
    assert newcomer.served == 50
    assert ledger.order() == [poor, newcomer, rich], "among equals, who waits longest"


def test_newcomer_is_lifted_even_when_nobody_waits_any_more() -> None:
    ledger: Ledger[Account] = Ledger()
    busy, newcomer = Account(served=70), Account()
    ledger.begin(busy)
    ledger.choose()
    ledger.end(busy)
    ledger.begin(newcomer)
    assert newcomer.served == 70


def test_who_had_more_keeps_its_debt_and_who_comes_back_is_not_lifted() -> None:
    ledger: Ledger[Account] = Ledger()
    poor, debtor, preempted = Account(served=10), Account(served=90), Account(served=1)
    ledger.begin(poor)
    ledger.begin(debtor)
    ledger.resume(preempted)
    assert (debtor.served, preempted.served) == (90, 1)
    assert ledger.is_level(poor)
    assert not ledger.is_level(debtor)
