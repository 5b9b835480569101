from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidRequest
from cluster.store import Store
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.journal_tables import entries, usage_records
from cluster.tenancy.key_records import api_keys
from cluster.tenancy.ledger import Ledger
from cluster.tenancy.metered import METERS, Metered, Outcome, Service
from cluster.tenancy.paging import new_id
from cluster.tenancy.postings import REVENUE
from cluster.tenancy.projects import DEFAULT
from cluster.tenancy.usage_report import By, Question, Sum, costs, usage
from tests.cluster.tenancy.accounts import PRICES, caller
from tests.cluster.tenancy.conftest import Clock

NOON = Clock().now
DAY = 86_400
GROUPS: list[By] = ["project", "user_id", "key_id", "model", "operation", "outcome"]
SERVICES: list[Service] = ["completions", "embeddings", "rerank", "classify", "infer"]


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
    by = usage(either_store, Question(start, start + DAY, by=("project", "outcome")))
    assert [(dict(each.group), each.metered.output_tokens, each.amount) for each in by] == [
        ({"project": "api", "outcome": "finished"}, 18, 90),
        ({"project": "web", "outcome": "finished"}, 37, 185),
        ({"project": "web", "outcome": "length"}, 11, 55),
    ]
    only = usage(either_store, Question(start, start + DAY, only={"project": ["api", "nobody"]}))
    assert [each.metered.requests for each in only] == [4]
    assert usage(either_store, Question(start, start + DAY, organization="umbrella")) == []


def test_buckets_are_whole_hours_cut_off_where_the_question_begins(ledger: Ledger, either_store: Store, clock: Clock) -> None:
    start = clock.now + 1000
    for number, at in enumerate((start - 0.5, start, clock.now + 3599.9999998, clock.now + 3600)):
        clock.now = at
        book(ledger, f"r{number}")
    found = usage(either_store, Question(start, NOON + 7200, 3600))
    assert [(each.begins, each.metered.requests) for each in found] == [(start, 2), (NOON + 3600, 1)]


def test_costs_by_line_say_of_what_how_much(ledger: Ledger, either_store: Store) -> None:
    ledger.prices.publish("default", PRICES)
    book(ledger, "r1", Metered(input_tokens=7, output_tokens=3))
    book(ledger, "r2", Metered(output_tokens=2))
    found = costs(either_store, Question(0, 1e11, by=("line",)))
    assert [(each.group["line"], each.quantity, each.amount) for each in found] == [
        ("chat, input_tokens", 7, 14),
        ("chat, output_tokens", 5, 25),
    ]
    assert [each.amount for each in costs(either_store, Question(0, 1e11, only={"line": ["chat, input_tokens"]}))] == [14]


def test_a_key_of_a_person_makes_its_usage_theirs(ledger: Ledger, either_store: Store, clock: Clock) -> None:
    accounts = Accounts(either_store, b"pepper", clock)
    ada = accounts.users.add(DEFAULT, "ada@example.org", "Ada", "owner").id
    key, _ = accounts.keys.create(DEFAULT, "hers")
    with either_store.begin() as connection:
        connection.execute(api_keys.update().where(api_keys.c.id == key).values(user_id=ada, service_account_id=None))
    for number, used in enumerate((key, "another", "another")):
        ledger.reserve(caller(key=used), f"r{number}", "chat", 1)
        ledger.settle(f"r{number}", None, "finished")
    by = usage(either_store, Question(0, 1e11, by=("user_id",)))
    assert {each.group["user_id"]: each.metered.requests for each in by} == {ada: 1, None: 2}
    assert [each.metered.requests for each in usage(either_store, Question(0, 1e11, only={"user_id": [ada]}))] == [1]


@pytest.mark.parametrize(
    "asked",
    [Question(2, 1), Question(0, 1e9, 60), Question(0, 1, by=("request_id",)), Question(0, 1, by=("line",))],  # type: ignore[arg-type]
)
def test_what_can_not_be_asked_is_refused(either_store: Store, asked: Question) -> None:
    with pytest.raises(InvalidRequest):
        usage(either_store, asked)


Booking = tuple[float, str, str, Service, Outcome, int, int]
REQUESTS: st.SearchStrategy[list[Booking]] = st.lists(
    st.tuples(
        st.integers(0, 3 * DAY * 10).map(lambda tenths: tenths / 10),  # seconds behind NOON
        st.sampled_from(["web", "api"]),
        st.sampled_from(["chat", "code", "chat:tuned"]),
        st.sampled_from(SERVICES),
        st.sampled_from(["finished", "length", "failed"]),
        st.integers(0, 5000),
        st.integers(0, 5000),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=REQUESTS,
    by=st.lists(st.sampled_from(GROUPS), unique=True),
    width=st.sampled_from([None, 60, 3600, DAY]),
    cut=st.data(),
)
def test_sums_over_any_grouping_and_width_are_the_ledgers_totals(
    either_store: Store, requests: list[Booking], by: list[By], width: int | None, cut: st.DataObject
) -> None:
    organization = fill(either_store, requests)
    asked = Question(NOON, NOON + 3 * DAY + 1, by=by, organization=organization)
    windows = cut_into(asked, width, cut)
    sums = [found for window in windows for found in usage(either_store, window)]
    lines = [found for window in windows for found in costs(either_store, replace(window, by=[*by, "line"]))]
    plain = [found for window in windows for found in costs(either_store, window)]
    assert total(sums) == totals(either_store, organization)
    assert sum(line.amount for line in lines) == sum(cost.amount for cost in plain) == total(sums)["amount"]
    assert -sum(line.amount for line in lines) == revenue(either_store, organization)
    if width:
        assert {found.begins % width for found in sums} <= {0, *(int(window.start) % width for window in windows)}


def fill(store: Store, requests: list[Booking]) -> str:
    """Books them for a new organization, whose name it returns: what a ledger holds can't be taken out again."""
    clock = Clock(0.0)
    ledger = Ledger(store, clock)
    if not ledger.prices.list():
        ledger.prices.publish("default", PRICES)
    organization = new_id("org")
    for number, (behind, project, model, operation, outcome, inside, outside) in enumerate(sorted(requests)):
        clock.now, request_id = NOON + behind, f"{organization}-{number}"
        ledger.reserve(caller(project, f"key-{project}", organization), request_id, model, 10**9, operation)
        ledger.settle(request_id, Metered(input_tokens=inside, output_tokens=outside), outcome)
    return organization


def cut_into(asked: Question, width: int | None, cut: st.DataObject) -> list[Question]:
    """Questions that meet, of no more buckets than may be asked for at once."""
    most = (width or DAY) * 1400
    edges = {int(asked.start), int(asked.end), *range(int(asked.start), int(asked.end), most)}
    edges |= set(cut.draw(st.lists(st.integers(int(asked.start) + 1, int(asked.end) - 1), max_size=3)))
    ordered = sorted(edges)
    return [replace(asked, start=begin, end=end, width_s=width) for begin, end in itertools.pairwise(ordered)]


def total(sums: list[Sum]) -> dict[str, int]:
    metered = {name: sum(getattr(each.metered, name) for each in sums) for name in METERS}
    return metered | {"amount": sum(each.amount for each in sums)}


def totals(store: Store, organization: str) -> dict[str, int]:
    """By the ledger's own rows, each by itself."""
    with store.read() as connection:
        rows = connection.execute(sa.select(usage_records).where(usage_records.c.organization == organization)).mappings().all()
    return {name: sum(row[name] for row in rows) for name in (*METERS, "amount")}


def revenue(store: Store, organization: str) -> int:
    of_revenue = sa.and_(entries.c.account == REVENUE, entries.c.organization == organization)
    with store.read() as connection:
        return int(connection.scalar(sa.select(sa.func.sum(entries.c.amount)).where(of_revenue)) or 0)


def book(ledger: Ledger, request_id: str, metered: Metered | None = None) -> None:
    ledger.reserve(caller(), request_id, "chat", 1000)
    ledger.settle(request_id, metered, "finished")
