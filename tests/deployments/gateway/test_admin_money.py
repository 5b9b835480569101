"""Usage, costs, spend limits, alerts, invoices and prices through the official client, every answer held against the document."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from cluster.store import Store
from cluster.tenancy import periods
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.ledger import Ledger
from cluster.tenancy.metered import Metered
from cluster.tenancy.metering import Metering
from cluster.tenancy.projects import DEFAULT
from cluster.tenancy.rating import PriceList
from cluster.tenancy.reconcile import problems
from cluster.tenancy.usage_report import Question
from deployments.gateway.openai.admin.billing import preferred
from deployments.gateway.openai.admin.usage_kinds import KINDS
from deployments.gateway.tenancy import Tenancy
from tests.cluster.tenancy.accounts import caller
from tests.cluster.tenancy.conftest import Clock
from tests.deployments.gateway.conftest import serving
from tests.deployments.gateway.test_admin import CHAT, MONEY, Office
from tests.deployments.gateway.test_specification import DOCUMENT

DAY = 86_400
OCTOBER = int(periods.month_start(periods.parse_month("2025-10")))
PRICES = PriceList.model_validate(
    {
        "currency": "USD",
        "fee": "1",
        "charges": [
            {"meter": "input_tokens", "price": "2", "per": 1_000_000},
            {"meter": "output_tokens", "price": "5", "per": 1_000_000},
            {"meter": "requests", "price": "0.01"},
            {"meter": "compute_seconds", "price": "0.1"},
        ],
    }
)


class Till(Office):
    """An office whose calls are metered. In October 2025 there were two requests a day in each of two projects."""

    def __init__(self, *parts: Any, store: Store) -> None:
        super().__init__(*parts)
        self.store = store
        self.web = self.accounts.projects.create(DEFAULT, "web").id

    @property
    def key(self) -> str:
        return self.accounts.keys.create(self.web, "caller")[1]

    def get(self, path: str, **headers: str) -> httpx.Response:
        authorization = {"Authorization": f"Bearer {self.admin_key}"}
        return httpx.get(f"{self.server.url}/v1/organization{path}", headers=authorization | headers, timeout=30)


@pytest.fixture(scope="module")
def till(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Till]:
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('till')}/mmaas.db")
    store.migrate()
    accounts = Accounts(store, b"pepper")
    _, admin_key = accounts.keys.create_admin(DEFAULT, "root", ["organization"])
    history(store)
    with serving(tenancy=Tenancy(accounts, metering=Metering(Ledger(store)))) as server:
        till = Till(server, accounts, admin_key, store=store)
        yield till
        till.close()
    assert problems(store) == []
    store.close()


def history(store: Store) -> None:
    clock = Clock(OCTOBER)
    ledger = Ledger(store, clock)
    ledger.prices.publish("default", PRICES)
    for number in range(124):
        clock.now = OCTOBER + number // 4 * DAY + number % 4 * 6 * 3600
        project, model = ("api", "chat") if number % 2 else ("lab", "code")
        ledger.reserve(caller(project, f"key-{project}", DEFAULT), f"r{number}", model, 10**9)
        ledger.settle(f"r{number}", Metered(input_tokens=10, output_tokens=number, compute_seconds=500_000), "finished")


def test_calls_become_usage_of_their_kind(till: Till) -> None:
    began = int(time.time())
    with till.client(till.key) as client, till.server.http(till.key) as http:
        client.chat.completions.create(**CHAT)
        assert list(client.chat.completions.create(**CHAT, stream=True))
        client.completions.create(model="echo", prompt="one")
        client.embeddings.create(model="echo", input="one", encoding_format="float")
        assert http.post("/v1/rerank", json={"model": "echo", "query": "a", "documents": ["b"]}).status_code == 200
        assert http.post("/v1/classify", json={"model": "echo", "input": "a"}).status_code == 200
        tensor = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1.0]}
        assert http.post("/v2/models/echo/infer", json={"inputs": [tensor]}).status_code == 400, "it takes no tensors"
    counted = {}
    for kind in KINDS:
        page = till.get(f"/usage/{kind.path}?start_time={began}&bucket_width=1d&project_ids={till.web}").json()
        counted[kind.path] = sum(result["num_model_requests"] for bucket in page["data"] for result in bucket["results"])
    used = {"completions": 3, "embeddings": 1, "reranks": 1, "classifications": 1}
    assert counted == dict.fromkeys(counted, 0) | used
    recorded = till.accounts.usage(Question(began, began + DAY, by=("operation",), only={"project": [till.web]}))
    assert {of.group["operation"]: of.metered.requests for of in recorded}["infer"] == 0, "recorded, and what failed isn't counted"


def test_usage_in_the_published_form(till: Till) -> None:
    usage = till.organization.usage
    page = usage.completions(start_time=OCTOBER, end_time=OCTOBER + 2 * DAY, group_by=["project_id", "model"])
    assert [(bucket.start_time, bucket.end_time) for bucket in page.data] == [
        (OCTOBER, OCTOBER + DAY),
        (OCTOBER + DAY, OCTOBER + 2 * DAY),
    ]
    found = [
        (result.project_id, result.model, result.num_model_requests, result.input_tokens, result.output_tokens, result.user_id)
        for result in page.data[0].results
        if result.object == "organization.usage.completions.result"
    ]
    assert found == [("api", "chat", 2, 20, 4, None), ("lab", "code", 2, 20, 2, None)]
    assert page.next_page is None
    ungrouped = usage.completions(start_time=OCTOBER, end_time=OCTOBER + DAY, group_by=["batch", "service_tier"]).data[0].results
    assert [(one.batch, one.service_tier, one.project_id) for one in ungrouped] == [(False, None, None)]  # type: ignore[union-attr]


def test_a_question_that_begins_within_a_day_has_shorter_first_and_last_buckets(till: Till) -> None:
    page = till.organization.usage.completions(start_time=OCTOBER + 1000, end_time=OCTOBER + DAY + 7)
    assert [(bucket.start_time - OCTOBER, bucket.end_time - OCTOBER) for bucket in page.data] == [(1000, DAY), (DAY, DAY + 7)]
    assert [bucket.results[0].num_model_requests for bucket in page.data] == [3, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize(("width", "limit", "pages"), [("1d", None, 5), ("1d", 31, 1), ("1h", 168, 5), ("1m", 1440, 31)])
def test_pages_follow_each_other_and_lose_nothing(till: Till, width: Any, limit: Any, pages: int) -> None:
    asked: dict[str, Any] = {"start_time": OCTOBER, "end_time": OCTOBER + 31 * DAY, "bucket_width": width}
    if limit:
        asked["limit"] = limit
    seen, edges, cursor = [], [], None
    while cursor is not None or not seen:
        page = till.organization.usage.completions(**asked, **({"page": cursor} if cursor else {}))
        seen.append(sum(result.output_tokens for bucket in page.data for result in bucket.results))  # type: ignore[union-attr]
        edges += [edge for bucket in page.data for edge in (bucket.start_time, bucket.end_time)]
        cursor = page.next_page
        assert page.has_more == (cursor is not None)
    assert len(seen) == pages
    assert sum(seen) == sum(range(124))
    assert edges[1:-1:2] == edges[2::2], "buckets meet"
    assert (edges[0], edges[-1]) == (OCTOBER, OCTOBER + 31 * DAY)


def test_filters_are_of_projects_keys_models_and_users(till: Till) -> None:
    def requests(**only: Any) -> int:
        page = till.organization.usage.completions(start_time=OCTOBER, end_time=OCTOBER + 31 * DAY, limit=31, **only)
        return sum(result.num_model_requests for bucket in page.data for result in bucket.results)  # type: ignore[union-attr]

    assert requests(project_ids=["api"]) == requests(api_key_ids=["key-api"]) == requests(models=["chat", "none"]) == 62
    assert requests(project_ids=["api"], models=["code"]) == 0
    assert requests(user_ids=["user_1"]) == requests(batch=True) == 0
    assert requests(batch=False) == 124
    strange = till.get(f"/usage/completions?start_time={OCTOBER}&end_time={OCTOBER + DAY}&models=%00").json()
    assert [bucket["results"] for bucket in strange["data"]] == [[]]


def test_of_what_there_is_none_buckets_are_empty(till: Till) -> None:
    usage = till.organization.usage
    asked: dict[str, Any] = {"start_time": OCTOBER, "end_time": OCTOBER + 3600, "bucket_width": "1h", "group_by": ["project_id"]}
    for kind in KINDS:
        if kind.operation is None:
            page = getattr(usage, kind.path)(**asked)
            assert [(bucket.start_time, list(bucket.results)) for bucket in page.data] == [(OCTOBER, [])], kind.path
    assert usage.embeddings(**asked).data[0].results == []


def test_costs_add_up_to_the_invoice(till: Till) -> None:
    usage = till.organization.usage
    asked: dict[str, Any] = {"start_time": OCTOBER, "end_time": OCTOBER + 31 * DAY, "limit": 180}
    total = 0
    for group_by in ([], ["project_id"], ["line_item"], ["project_id", "line_item", "api_key_id", "user_id"]):
        page = usage.costs(**asked, group_by=group_by)  # type: ignore[arg-type]
        results: list[Any] = [result for bucket in page.data for result in bucket.results]
        assert {result.amount.currency for result in results} == {"usd"}
        total = total or sum(round(result.amount.value * 1e6) for result in results)
        assert sum(round(result.amount.value * 1e6) for result in results) == total
        assert all((result.project_id is None) == ("project_id" not in group_by) for result in results)
    assert total == 124 * (10 * 2 + 10_000 + 50_000) + 5 * sum(range(124))
    assert till.accounts.invoices.draft(DEFAULT, "2025-10").subtotal == total + 1_000_000, "and the fee"
    [line] = [
        result
        for result in usage.costs(start_time=OCTOBER, end_time=OCTOBER + DAY, group_by=["line_item", "project_id"]).data[0].results
        if result.line_item == "chat, compute_seconds"  # type: ignore[union-attr]
    ]
    assert (line.project_id, line.quantity, line.quantity_unit) == ("api", 1.0, "duration_seconds")  # type: ignore[union-attr]
    only = usage.costs(**asked, project_ids=["lab"], extra_query={"line_items": ["code, requests"]})
    assert sum(round(result.amount.value * 1e6) for bucket in only.data for result in bucket.results) == 62 * 10_000  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/usage/completions", "start_time"),
        ("/usage/completions?start_time=5&end_time=5", "end_time"),
        ("/usage/completions?start_time=99999999999", "end_time"),
        ("/usage/completions?start_time=-1", "start_time"),
        ("/usage/completions?start_time=1e400", "start_time"),
        ("/usage/completions?start_time=0&bucket_width=2h", "bucket_width"),
        ("/usage/completions?start_time=0&limit=32", "limit"),
        ("/usage/completions?start_time=0&limit=0", "limit"),
        ("/usage/completions?start_time=0&bucket_width=1m&limit=1441", "limit"),
        ("/usage/completions?start_time=0&page=page_7", "page"),
        ("/usage/completions?start_time=86400&page=page_0", "page"),
        ("/usage/completions?start_time=0&page=page_9999999999999999", "page"),
        ("/usage/completions?start_time=0&group_by=line_item", "group_by"),
        ("/usage/vector_stores?start_time=0&group_by[]=model", "group_by"),
        ("/usage/completions?start_time=0&" + "&".join(["models[]=x"] * 101), "models"),
        ("/costs?start_time=0&bucket_width=1h", "bucket_width"),
        ("/costs?start_time=0&limit=181", "limit"),
        ("/costs?start_time=0&group_by=model", "group_by"),
    ],
)
def test_what_can_not_be_asked_is_refused_by_name(till: Till, path: str, param: str) -> None:
    answer = till.get(path)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize("of_project", [False, True])
def test_a_spend_limit_refuses_what_could_pass_it(till: Till, of_project: bool) -> None:
    limits: Any = till.organization.projects.spend_limit if of_project else till.organization.spend_limit
    of = {"project_id": till.web} if of_project else {}
    with pytest.raises(openai.NotFoundError):
        limits.retrieve(*of.values())
    made = limits.update(*of.values(), threshold_amount=1_000_000, currency="USD", interval="month")
    assert (made.threshold_amount, made.currency, made.interval, made.enforcement.status) == (1_000_000, "USD", "month", "inactive")
    with till.client(till.key) as client:
        client.chat.completions.create(**CHAT, max_completion_tokens=1)
        spent = float(limits.retrieve(*of.values()).spent)
        assert 0.01 <= spent < 10
        limits.update(*of.values(), threshold_amount=1, currency="USD", interval="month")
        with pytest.raises(openai.RateLimitError, match="monthly budget") as refused:
            client.chat.completions.create(**CHAT, max_completion_tokens=1)
    assert refused.value.code == "insufficient_quota"
    assert limits.retrieve(*of.values()).enforcement.status == "enforcing"
    assert limits.update(*of.values(), threshold_amount=7, currency="USD", interval="day").interval == "day"
    assert limits.retrieve(*of.values()).threshold_amount == 1, "a day's limit stands beside the month's"
    assert limits.delete(*of.values()).deleted
    assert limits.delete(*of.values(), extra_query={"interval": "day"}).deleted
    assert not limits.delete(*of.values()).deleted
    with till.client(till.key) as client:
        client.chat.completions.create(**CHAT)


def test_spend_alerts_are_made_changed_listed_and_passed(till: Till) -> None:
    channel: Any = {"type": "email", "recipients": ["ada@example.org"], "subject_prefix": "Spend"}
    terms: Any = {"currency": "USD", "interval": "month", "notification_channel": channel}
    alerts = till.organization.spend_alerts
    made = [alerts.create(threshold_amount=amount, **terms) for amount in (0, 10**9, 10**10)]
    assert [alert.id for alert in alerts.list(limit=1)] == [alert.id for alert in made]
    assert [alert.id for alert in alerts.list(limit=2, order="desc", after=made[2].id).data] == [made[1].id, made[0].id]
    assert [alert.id for alert in alerts.list(limit=1, before=made[2].id).data] == [made[1].id]
    assert alerts.list(limit=0).data == []
    assert alerts.update(made[1].id, threshold_amount=5, **{**terms, "interval": "month"}).threshold_amount == 5
    assert alerts.retrieve(made[1].id).interval == "month"
    inside = till.organization.projects.spend_alerts
    small = inside.create(till.web, threshold_amount=0, **terms)
    assert inside.retrieve(small.id, project_id=till.web).notification_channel.subject_prefix == "Spend"
    assert inside.update(small.id, project_id=till.web, threshold_amount=1, **terms).threshold_amount == 1
    with pytest.raises(openai.NotFoundError):
        alerts.retrieve(small.id)
    with till.client(till.key) as client:
        for _ in range(6):
            client.chat.completions.create(**CHAT)
    passed = {one.alert_id for one in till.accounts.spend_alerts.evaluate()}
    assert passed == {made[0].id, made[1].id, small.id}
    assert till.accounts.spend_alerts.evaluate() == [], "once a month"
    shown = {alert.id: alert.last_passed for alert in alerts.list()}  # type: ignore[attr-defined]
    assert shown[made[1].id]["mailed_at"] is None
    assert float(shown[made[1].id]["spent"]) >= 0.05
    assert shown[made[2].id] is None
    assert [alert.id for alert in inside.list(till.web)] == [small.id]
    assert inside.delete(small.id, project_id=till.web).deleted
    assert all(alerts.delete(alert.id).deleted for alert in made)
    with pytest.raises(openai.NotFoundError):
        alerts.retrieve(made[0].id)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"currency": "EUR"}, "currency"),
        ({"currency": "usd"}, "currency"),
        ({"threshold_amount": -1}, "threshold_amount"),
        ({"threshold_amount": 1.5}, "threshold_amount"),
        ({"threshold_amount": 10**12}, "threshold_amount"),
        ({"interval": "year"}, "interval"),
        ({"notification_channel": {"type": "sms", "recipients": ["a@b.org"]}}, "notification_channel.type"),
        ({"notification_channel": {"type": "email", "recipients": []}}, "notification_channel.recipients"),
        ({"notification_channel": {"type": "email", "recipients": ["a@b.org\r\nBcc: x"]}}, "notification_channel.recipients"),
        (
            {"notification_channel": {"type": "email", "recipients": ["a@b.org"], "subject_prefix": "a\nb"}},
            "notification_channel.subject_prefix",
        ),
    ],
)
def test_what_is_no_alert_is_refused(till: Till, change: dict[str, Any], param: str) -> None:
    channel = {"type": "email", "recipients": ["a@example.org"]}
    whole = {"threshold_amount": 1, "currency": "USD", "interval": "month", "notification_channel": channel} | change
    answer = till.call("POST", "/organization/spend_alerts", till.admin_key, whole)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert till.get("/spend_alerts").json()["data"] == []


def test_every_money_route_of_the_document_was_driven_and_conforms(till: Till) -> None:
    """Runs behind the walks above, in this file's order."""
    wanted = {(method, path) for path, operations in DOCUMENT["paths"].items() if MONEY.search(path) for method in operations}
    assert len(wanted) > 25
    assert sorted(wanted - till.conformity.seen) == []


def test_invoices_in_every_form(till: Till) -> None:
    assert till.get("/invoices").json()["data"] == []
    draft = till.get("/invoices/2025-10").json()
    assert draft["issued_at"] is None
    made = till.accounts.invoices.issue(DEFAULT, "2025-10")
    listed = till.get("/invoices").json()["data"]
    assert [(one["id"], one["total"]) for one in listed] == [(made.id, draft["total"])]
    assert till.get(f"/invoices/{made.id}").json()["lines"] == draft["lines"]
    for form, kind, begins in (
        ("csv", "text/csv", b"invoice,"),
        ("pdf", "application/pdf", b"%PDF-"),
        ("focus", "application/vnd.focus+csv", b"BilledCost,"),
    ):
        for answer in (
            till.get(f"/invoices/{made.id}?format={form}"),
            till.get(f"/invoices/{made.id}", Accept=f"{kind};q=0.9, */*"),
        ):
            assert answer.headers["content-type"].partition(";")[0] == kind
            assert answer.headers["content-disposition"].startswith(f'attachment; filename="{made.id}.')
            assert answer.content.startswith(begins)
    for strange in ("INV-2025-09-default", "INV-2025-10-other", "2025-13", "INV-2025-10-", "x"):
        assert till.get(f"/invoices/{strange}").status_code == 404, strange
    assert till.get(f"/invoices/{made.id}?format=xml").status_code == 400


def test_accept_names_the_form() -> None:
    assert [preferred(text) for text in ("", "*/*", "image/png", "text/csv;q=0, application/json", "text/csv;q=x")] == ["json"] * 5
    assert preferred("application/json;q=0.5, application/pdf;q=0.7, text/csv;q=0.6") == "pdf"


def test_prices_are_those_of_the_organizations_plan(till: Till) -> None:
    till.accounts.prices.publish("gold", PRICES)
    till.accounts.prices.publish("default", PRICES.model_copy(update={"charges": ()}), time.time() + 1e6)
    versions = till.get("/prices").json()["data"]
    assert [(one["plan"], one["in_force"]) for one in versions] == [("default", True), ("default", False)]
    assert versions[0]["prices"]["charges"][0] == versions[0]["prices"]["charges"][0] | {"meter": "input_tokens", "price": "2"}


def test_who_may_see_and_who_may_change(till: Till) -> None:
    _, reader = till.accounts.keys.create_admin(DEFAULT, "reader", ["billing.read"])
    _, analyst = till.accounts.keys.create_admin(DEFAULT, "analyst", ["usage.read"])
    body = {"threshold_amount": 1, "currency": "USD", "interval": "month"}
    assert till.call("GET", "/organization/invoices", reader).status_code == 200
    assert till.call("POST", "/organization/spend_limit", reader, body).status_code == 403
    assert till.call("GET", f"/organization/costs?start_time={OCTOBER}", analyst).status_code == 200
    assert till.call("GET", "/organization/spend_alerts", analyst).status_code == 403


def test_another_organization_sees_nothing_of_it(till: Till) -> None:
    other = till.accounts.projects.found("other").id
    _, key = till.accounts.keys.create_admin(other, "stranger", ["organization"])
    for path in ("usage/completions", "costs"):
        answer = till.call("GET", f"/organization/{path}?start_time={OCTOBER}&end_time={OCTOBER + DAY}&project_ids=api", key).json()
        assert [bucket["results"] for bucket in answer["data"]] == [[]]
    assert till.call("GET", "/organization/invoices", key).json()["data"] == []
    assert re.search("no such invoice", till.call("GET", f"/organization/invoices/INV-2025-10-{DEFAULT}", key).text)
