"""What the gateway writes into the audit log, and how the official client reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.store import Store
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.audit import Audit
from cluster.tenancy.chain import Actor
from cluster.tenancy.denials import Denials
from cluster.types import Principal
from deployments.gateway import calls
from deployments.gateway.entrance import Entrance
from deployments.gateway.openai.admin import audit_logs
from deployments.gateway.tenancy import Tenancy
from tests.cluster.tenancy.conftest import Clock
from tests.deployments.gateway.conftest import Server, serving
from tests.deployments.gateway.test_specification import DOCUMENT, check
from tests.fakes import EchoModels, KeyRing

SOMEBODY = Actor("session", "ada@host", email="ada@example.org", address="10.0.0.1")
KEY = Actor("api_key", "0123456789ab")

ACTS: list[tuple[Any, ...]] = [
    (KEY, "project.created", "proj_1", None, {"name": "p"}),
    (KEY, "project.updated", "proj_1", {"name": "p"}, {"name": "q"}),
    (KEY, "project.archived", "proj_1", {"archived_at": None}, {"archived_at": 5.0}),
    (SOMEBODY, "api_key.created", "key_1", None, {"scopes": "annotate inference"}),
    (SOMEBODY, "api_key.updated", "key_1", {"scopes": "a"}, {"scopes": "b"}),
    (SOMEBODY, "api_key.deleted", "key_1", {"scopes": "b"}, None),
    (KEY, "service_account.created", "sa_1", None, {"role": "member"}),
    (KEY, "service_account.updated", "sa_1", {"role": "member"}, {"role": "owner"}),
    (KEY, "service_account.deleted", "sa_1", None, None),
    (KEY, "user.added", "u_1", None, {"role_id": "role_organization_owner"}),
    (KEY, "user.updated", "u_1", {"role_id": "role_organization_owner"}, {"role_id": "role_1"}),
    (KEY, "user.deleted", "u_1", None, None),
    (KEY, "invite.sent", "i_1", None, {"email": "a@example.org", "role_id": "role_organization_reader"}),
    (KEY, "invite.accepted", "i_1", None, None),
    (KEY, "group.created", "g_1", None, {"name": "all"}),
    (KEY, "rate_limit.updated", "rl_1", None, {"requests": 5, "tokens": None}),
    (KEY, "rate_limit.deleted", "rl_1", None, None),
    (KEY, "role.created", "r_1", None, {"name": "x", "permissions": "a b", "project_id": "p", "organization_id": "default"}),
    (KEY, "role.updated", "r_1", {"name": "x", "permissions": "a b"}, {"name": "y", "permissions": "b c", "organization_id": "o"}),
    (KEY, "role.deleted", "r_1", {"name": "y"}, None),
    (KEY, "role.assignment.created", "u", None, {"holder_id": "u", "kind": "user", "role_id": "r_1", "project_id": "p"}),
    (KEY, "role.assignment.deleted", "u", {"holder_id": "u", "kind": "user", "role_id": "r_1", "project_id": ""}, None),
    (KEY, "organization.updated", "org", None, {"too_long": 9000, "sha256": "0"}),
    (Actor("system", "gateway"), "login.failed", "/v1/models", None, {"code": "invalid_api_key", "count": 3}),
]


class Logged:
    def __init__(self, path: Path) -> None:
        self.clock = Clock()
        self.store = Store(f"sqlite:///{path}/mmaas.db")
        self.store.migrate()
        self.audit = Audit(self.store, bytes(32), self.clock)
        self.denials = Denials(self.audit, self.clock)
        self.tenancy = Tenancy(Accounts(self.store, b"pepper"), audit=self.audit, denials=self.denials)

    def denied(self) -> list[tuple[str, str, str, int]]:
        """Who, what, why and how often, of what is new."""
        start = self.audit.head().number
        self.denials.write(everything=True)
        records = [record for record in self.audit.records() if record.number > start]
        told = [(record, json.loads(record.after or "")) for record in records]
        return [(record.actor.id, record.target or "", after["code"], after["count"]) for record, after in told]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    logged = Logged(tmp_path_factory.mktemp("audit"))
    yield logged
    logged.store.close()


@pytest.fixture(scope="module")
def audited(logged: Logged) -> Iterator[Server]:
    for number, act in enumerate(ACTS):
        logged.clock.now = 1_700_000_000.0 + number
        logged.audit.record(*act, organization="default", project="proj_1" if number % 2 else None)
    logged.audit.record(KEY, "project.created", "theirs", organization="other")
    ring = KeyRing()
    ring.principals["mk_theirs_0123456"] = Principal("", "key_t", frozenset({"audit.read"}), organization="other")
    with serving(tenancy=logged.tenancy, verify=ring.verify) as server:
        yield server


@pytest.fixture
def client(audited: Server) -> Iterator[openai.OpenAI]:
    options: dict[str, Any] = {"max_retries": 0, "_strict_response_validation": True}
    with openai.OpenAI(base_url=f"{audited.url}/v1", api_key="none", admin_api_key=KeyRing.OWNER, **options) as client:
        yield client


def test_the_official_client_reads_every_type_page_by_page(client: openai.OpenAI) -> None:
    found = list(client.admin.organization.audit_logs.list(limit=4))
    assert [one.type for one in found] == [act[1] for act in reversed(ACTS)]
    created = found[-1]
    assert created.project_created is not None
    assert created.project_created.id == "proj_1"
    assert created.actor is not None
    assert created.actor.api_key is not None
    assert created.actor.api_key.id == KEY.id
    by_person = next(one for one in found if one.type == "api_key.created")
    assert by_person.actor is not None
    assert by_person.actor.session is not None
    assert (by_person.actor.session.ip_address, by_person.actor.session.user.email) == ("10.0.0.1", "ada@example.org")  # type: ignore[union-attr]


def test_answers_conform_to_the_published_schema(audited: Server) -> None:
    with audited.http(KeyRing.OWNER) as http:
        answer = http.get("/v1/organization/audit_logs", params={"limit": 100})
    check("ListAuditLogsResponse", answer.json())
    assert len(answer.json()["data"]) == len(ACTS)


def test_published_fields_are_made_of_the_rows(audited: Server) -> None:
    with audited.http(KeyRing.OWNER) as http:
        listed = http.get("/v1/organization/audit_logs", params={"limit": 100}).json()["data"]
    told = {one["type"]: {k: v for k, v in one[one["type"]].items() if k not in ("id", "before", "after")} for one in listed}
    place = {"resource_id": "p", "resource_type": "api.project"}
    assert told == {kind: {} for kind in told} | {
        "project.created": {"data": {"name": "p", "title": "p"}},
        "project.updated": {"changes_requested": {"name": "q", "title": "q"}},
        "api_key.created": {"data": {"scopes": ["annotate", "inference"]}},
        "api_key.updated": {"changes_requested": {"scopes": ["b"]}},
        "service_account.created": {"data": {"role": "member"}},
        "service_account.updated": {"changes_requested": {"role": "owner"}},
        "user.added": {"data": {"role": "owner"}},
        "user.updated": {"changes_requested": {"role": "role_1"}},
        "invite.sent": {"data": {"email": "a@example.org", "role": "reader"}},
        "group.created": {"data": {"group_name": "all"}},
        "rate_limit.updated": {"changes_requested": {"max_requests_per_1_minute": 5}},
        "role.created": {"role_name": "x", "permissions": ["a", "b"], **place},
        "role.updated": {
            "changes_requested": {
                "role_name": "y",
                "permissions_added": ["c"],
                "permissions_removed": ["a"],
                "resource_id": "o",
                "resource_type": "api.organization",
            }
        },
        "role.assignment.created": {"principal_id": "u", "principal_type": "user", **place, "resource_type": "project"},
        "role.assignment.deleted": {"principal_id": "u", "principal_type": "user", "resource_type": "organization"},
        "login.failed": {"error_code": "invalid_api_key", "error_message": "refused at /v1/models"},
    }


def test_our_types_are_published_ones() -> None:
    assert set(DOCUMENT["components"]["schemas"]["AuditLogEventType"]["enum"]) >= audit_logs.PUBLISHED


def test_the_clients_filters_choose(client: openai.OpenAI) -> None:
    logs = client.admin.organization.audit_logs
    assert {one.type for one in logs.list(event_types=["api_key.created", "user.added"])} == {"api_key.created", "user.added"}
    assert {one.type for one in logs.list(actor_emails=["ada@example.org"])} == {
        "api_key.created",
        "api_key.updated",
        "api_key.deleted",
    }
    assert {one.type for one in logs.list(actor_ids=["gateway"])} == {"login.failed"}
    assert {one.type for one in logs.list(resource_ids=["org"])} == {"organization.updated"}
    assert {one.project.id for one in logs.list(project_ids=["proj_1"]) if one.project} == {"proj_1"}
    start = 1_700_000_000
    times = [one.effective_at - start for one in logs.list(effective_at={"gt": start + 3, "lte": start + 6})]
    assert times == [6, 5, 4]
    assert [one.effective_at - start for one in logs.list(effective_at={"gte": start + 3, "lt": start + 5})] == [4, 3]
    page = logs.list(limit=2)
    older = logs.list(limit=2, after=page.data[-1].id)
    back = logs.list(limit=2, before=older.data[0].id)
    assert [one.id for one in back.data] == [one.id for one in page.data]


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "effective_at[gt]=now", "event_types[]=DROP TABLE"])
def test_what_can_not_be_asked_is_400(audited: Server, query: str) -> None:
    with audited.http(KeyRing.OWNER) as http:
        assert http.get(f"/v1/organization/audit_logs?{query}").status_code == 400


def test_another_organization_has_its_own_log(audited: Server) -> None:
    with audited.http("mk_theirs_0123456") as http, audited.http(KeyRing.OWNER) as ours:
        [only] = http.get("/v1/organization/audit_logs").json()["data"]
        foreign = ours.get("/v1/organization/audit_logs", params={"after": only["id"]})
        absent = ours.get("/v1/organization/audit_logs", params={"after": "audit_log-none"})
    assert only["project.created"]["id"] == "theirs"
    assert foreign.status_code == absent.status_code == 404
    assert foreign.text.replace(only["id"], "") == absent.text.replace("audit_log-none", "")


def test_users_keys_do_not_read_it(audited: Server) -> None:
    with audited.http() as http:
        assert http.get("/v1/organization/audit_logs").status_code == 403


def test_acts_over_http_are_recorded_and_listed_by_name(audited: Server, logged: Logged) -> None:
    with audited.http(KeyRing.ADMIN) as operator, audited.http(KeyRing.OWNER) as http:
        slept = operator.post("/v1/models/echo/sleep")
        operator.post("/v1/models/echo/wake")
        operator.post("/v1/models/none/sleep")
        params = {"event_types[]": ["model.put_to_sleep", "model.woken"]}
        woken, asleep = http.get("/v1/organization/audit_logs", params=params).json()["data"]
        everything = http.get("/v1/organization/audit_logs", params={"event_types[]": "*", "limit": 100}).json()["data"]
    assert (asleep["type"], asleep["model.put_to_sleep"]["id"]) == ("model.put_to_sleep", "echo")
    assert woken["actor"]["api_key"]["id"] == "key_admin"
    assert woken["project"] == {"id": "acme"}
    assert slept.headers["x-request-id"] in {record.request_id for record in logged.audit.records()}
    assert len(everything) >= len(ACTS) + 2


def test_every_denial_is_in_the_log_with_who_what_and_why(audited: Server, logged: Logged) -> None:
    logged.denied()
    good_form = "mk_" + "0123456789ab" + "0" * 72
    with httpx.Client(base_url=audited.url) as http:
        for key in ("wrong", good_form, good_form):
            http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
        http.get("/v1/../../etc/passwd")
        http.get("/v1/models", headers={"Authorization": f"Bearer {KeyRing.USER}"})
        http.get("/metrics", headers={"Authorization": f"Bearer {KeyRing.USER}"})
        http.post("/v1/models/echo/sleep", headers={"Authorization": f"Bearer {KeyRing.USER}"})
        http.get("/v1/models/none", headers={"Authorization": f"Bearer {KeyRing.USER}"})
    assert sorted(logged.denied()) == [
        ("0123456789ab", "/v1/models", "invalid_api_key", 2),
        ("key_user", "/metrics", "insufficient_permissions", 1),
        ("key_user", "/v1/models/{model}/sleep", "insufficient_permissions", 1),
        ("unknown", "/v1/models", "invalid_api_key", 1),
        ("unknown", "unmatched", "invalid_api_key", 1),
    ]
    assert logged.audit.verify().problems == ()
    assert good_form not in repr(list(logged.audit.records()))


async def test_denials_over_a_handle_are_noted_too(logged: Logged) -> None:
    from cluster.settings import GatewaySettings

    logged.denied()
    entrance = Entrance.of(EchoModels(), KeyRing().verify, GatewaySettings(), logged.tenancy)
    for key, operation in (("wrong", "models.list"), ("mk_no_scope_012345", "models.list"), ("wrong", "rm -rf")):
        with pytest.raises(Exception, match="key"):
            await anext(calls.call(entrance, key, operation, {}))
    assert sorted(logged.denied()) == [
        ("key_none", "models.list", "insufficient_permissions", 1),
        ("unknown", "models.list", "invalid_api_key", 1),
        ("unknown", "unmatched", "invalid_api_key", 1),
    ]
