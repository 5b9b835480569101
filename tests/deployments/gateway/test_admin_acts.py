"""Every administrative route that changes something, asked once over HTTP: what it changed is in the audit log, with who."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from cluster.store import Store
from cluster.tenancy import budgets
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.audit import Audit
from cluster.tenancy.chain import Actor
from cluster.tenancy.projects import DEFAULT
from cluster.tenancy.spend_alerts import Wish
from deployments.gateway.openai.admin.audit_logs import PUBLISHED
from deployments.gateway.openai.admin.routes import routes
from deployments.gateway.tenancy import Tenancy
from tests.cluster.conftest import postgres_url  # noqa: F401 - a fixture
from tests.cluster.tenancy.watching import Watched, rows, watching
from tests.deployments.gateway.conftest import Server, serving
from tests.deployments.gateway.test_specification import check

ROUTES = sorted(
    (route.endpoint.__name__ if "holder" not in route.path else route.name, method, route.path)
    for route in routes
    for method in route.methods
    if method != "GET"
)
SPENDING = {"threshold_amount": 7, "currency": "EUR", "interval": "month"}
ALERT = SPENDING | {"notification_channel": {"type": "email", "recipients": ["ada@example.org"]}}
BODIES: dict[str, dict[str, Any]] = {
    "create_project": {"name": "shop"},
    "update_project": {"name": "site"},
    "create_service_account": {"name": "bot", "models": ["echo"]},
    "update_service_account": {"name": "robot", "role": "owner"},
    "create_key": {"name": "second", "expires_in_seconds": 60},
    "update_key": {"scopes": ["annotate"]},
    "create_admin_key": {"name": "second", "scopes": ["users.read"]},
    "update_user": {"role": "reader"},
    "create_member": {"user_id": "GUEST", "role": "owner"},
    "update_member": {"role": "owner"},
    "create_group": {"name": "all"},
    "update_group": {"name": "some"},
    "create_group_user": {"user_id": "GUEST"},
    "create_project_group": {"group_id": "EMPTY", "role": "owner"},
    "create_role": {"role_name": "reader of keys", "permissions": ["keys.read"]},
    "create_project_role": {"role_name": "labeller", "permissions": ["annotate"]},
    "update_role": {"role_name": "warden", "permissions": ["users.read"]},
    "update_project_role": {"role_name": "writer", "description": "writes"},
    "assign_user_role": {"role_id": "role_organization_auditor"},
    "assign_group_role": {"role_id": "role_organization_auditor"},
    "assign_project_user_role": {"role_id": "role_project_owner"},
    "assign_project_group_role": {"role_id": "role_project_owner"},
    "create_invite": {"email": "eve@example.org", "role": "reader", "projects": [{"id": "PROJECT", "role": "member"}]},
    "update_rate_limit": {"max_requests_per_1_minute": 7},
    "update_model_permissions": {"mode": "allow_list", "model_ids": ["echo"]},
    **dict.fromkeys(["update_spend_limit", "update_project_spend_limit"], SPENDING),
    **dict.fromkeys(["create_spend_alert", "create_project_spend_alert"], ALERT),
    **dict.fromkeys(["update_spend_alert", "update_project_spend_alert"], ALERT),
}


class World:
    """An organization that is asked for everything, with one of everything for each question."""

    def __init__(self, store: Store, server: Server, audit: Audit, accounts: Accounts) -> None:
        self.store, self.server, self.audit = store, server, audit
        self.accounts = accounts.by(Actor("session", "builder"))
        self.key_id, self.key = self.accounts.keys.create_admin(DEFAULT, "root", ["organization"])

    def ids(self, path: str) -> dict[str, str]:
        """Of things made for this one question."""
        to = self.accounts
        project = to.projects.create(DEFAULT, "web").id
        many = len(rows(self.store))
        user, guest = (to.users.add(DEFAULT, f"{name}{many}@example.org", name, "owner").id for name in ("ada", "guest"))
        group, empty = (to.groups.create(DEFAULT, name).id for name in ("crew", "empty"))
        to.groups.add(DEFAULT, group, user)
        to.groups.join(DEFAULT, project, group, "member")
        to.users.join(DEFAULT, project, user, "member")
        role = to.roles.create(DEFAULT, None, f"keeper {many}", ["keys.read"]).id
        inside = to.roles.create(DEFAULT, project, "scribe", ["annotate"]).id
        for kind, holder in (("user", user), ("group", group)):
            to.roles.assign(DEFAULT, None, kind, holder, role)  # type: ignore[arg-type]
            to.roles.assign(DEFAULT, project, kind, holder, inside)  # type: ignore[arg-type]
        key, _ = to.keys.create(project, "key")
        to.model_permissions.put(project, "deny_list", ["none"])
        scope = budgets.scope(*(("project", project) if "/projects/" in path else ("organization", DEFAULT)))
        for kind, name in (("organization", DEFAULT), ("project", project)):
            to.budgets.set(kind, name, "month", 50_000_000)  # type: ignore[arg-type]
        holders = {"holder_id": user if "/users/" in path else group, "role_id": inside if "/projects/" in path else role}
        return holders | {
            "project_id": project,
            "service_account_id": to.service_accounts.list(DEFAULT, project).items[0].id,
            "api_key_id": key,
            "key_id": to.keys.create_admin(DEFAULT, "other", ["users.read"])[0],
            "user_id": user,
            "group_id": group,
            "invite_id": to.invites.create(DEFAULT, f"bob{many}@example.org", "owner")[0].id,
            "rate_limit_id": "rl-echo",
            "alert_id": to.spend_alerts.create(DEFAULT, scope, Wish(1, "month", ("ada@example.org",))).id,
            "guest": guest,
            "empty": empty,
        }

    def ask(self, method: str, path: str, body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.request(method, f"{self.server.url}{path}", headers=headers, json=body, timeout=30)

    def do(self, name: str, method: str, path: str) -> tuple[httpx.Response, Watched]:
        ids = self.ids(path)
        words = {"GUEST": ids["guest"], "EMPTY": ids["empty"], "PROJECT": ids["project_id"]}
        body = re.sub("|".join(words), lambda found: words[found[0]], json.dumps(BODIES.get(name, {})))
        with watching(self.store, self.audit) as seen:
            answer = self.ask(method, path.format(**ids), json.loads(body))
        return answer, seen


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    is_sqlite = request.param == "sqlite"
    directory = tmp_path_factory.mktemp("acts")
    store = Store(f"sqlite:///{directory}/mmaas.db" if is_sqlite else request.getfixturevalue("postgres_url"))
    store.migrate()
    audit = Audit(store, bytes(32))
    accounts = Accounts(store, b"pepper", audit=audit)
    with serving(tenancy=Tenancy(accounts, audit=audit)) as server:
        yield World(store, server, audit, accounts)
    store.downgrade("base")
    store.close()


def test_there_are_routes_that_change_something() -> None:
    assert len(ROUTES) > 40
    assert BODIES.keys() <= {name for name, _, _ in ROUTES}


@pytest.mark.parametrize(("name", "method", "path"), ROUTES, ids=[name for name, _, _ in ROUTES])
def test_what_a_route_changes_is_recorded_as_its_callers(world: World, name: str, method: str, path: str) -> None:
    answer, seen = world.do(name, method, path)
    assert answer.is_success, answer.text
    seen.check()
    for record in seen.records:
        assert record.actor == Actor("api_key", world.key_id, address="127.0.0.1")
        assert (record.organization, record.request_id) == (DEFAULT, answer.headers["x-request-id"])
        assert "project_id" not in path or record.project


@pytest.mark.parametrize("name", ["create_project", "create_service_account", "delete_user", "rotate_key", "update_rate_limit"])
def test_a_log_that_can_not_be_written_lets_nothing_be_done(world: World, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [(method, path)] = [(method, path) for known, method, path in ROUTES if known == name]
    append = Audit._append

    def broken(audit: Audit, connection: Any, draft: Any) -> Any:
        append(audit, connection, draft)
        if draft.actor.kind == "api_key":
            raise OSError("the log's disk is full")

    monkeypatch.setattr(Audit, "_append", broken)
    answer, seen = world.do(name, method, path)
    assert answer.status_code == 500
    assert (seen.records, seen.changed) == ([], [])


def test_the_official_client_lists_what_was_done(world: World) -> None:
    options: dict[str, Any] = {"max_retries": 0, "_strict_response_validation": True}
    with openai.OpenAI(base_url=f"{world.server.url}/v1", api_key="none", admin_api_key=world.key, **options) as client:
        project = client.admin.organization.projects.create(name="listed")
        key = client.admin.organization.projects.service_accounts.create(project.id, name="bot").api_key
        assert key is not None
        client.admin.organization.projects.api_keys.delete(key.id, project_id=project.id)
        found = list(client.admin.organization.audit_logs.list(project_ids=[project.id]))
    assert [one.type for one in found] == ["api_key.deleted", "api_key.created", "service_account.created", "project.created"]
    deleted, created, account, first = found
    assert deleted.api_key_deleted is not None
    assert created.api_key_created is not None
    assert account.service_account_created is not None
    assert first.project_created is not None
    assert deleted.api_key_deleted.id == created.api_key_created.id == key.id
    assert created.api_key_created.data is not None
    assert account.service_account_created.data is not None
    assert first.project_created.data is not None
    assert (created.api_key_created.data.scopes, account.service_account_created.data.role) == (["inference"], "member")
    assert (first.project_created.id, first.project_created.data.name) == (project.id, "listed")
    assert all(one.actor and one.actor.api_key and one.actor.api_key.id == world.key_id for one in found)


def test_events_of_real_acts_conform_to_the_published_schema(world: World) -> None:
    answer = world.ask("GET", "/v1/organization/audit_logs?limit=100", None)
    check("ListAuditLogsResponse", answer.json())
    assert {one["type"] for one in answer.json()["data"]} <= PUBLISHED
    assert world.audit.verify().problems == ()
