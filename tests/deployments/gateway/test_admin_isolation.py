"""Every administrative route x every kind of object of one organization x an owner's key of another: as if it were not there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from cluster.errors import NotFound
from cluster.store import Store, metadata
from cluster.tenancy import projects
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.budgets import scope
from cluster.tenancy.projects import DEFAULT
from cluster.tenancy.spend_alerts import Wish
from deployments.gateway.openai.admin.routes import routes
from deployments.gateway.tenancy import Tenancy
from tests.deployments.gateway.conftest import Server, serving

ALERT = {
    "threshold_amount": 1,
    "currency": "EUR",
    "interval": "month",
    "notification_channel": {"type": "email", "recipients": ["spy@example.org"]},
}
BODIES: dict[str, dict[str, Any]] = {
    "create_service_account": {"name": "spy"},
    "create_key": {"name": "spy"},
    "update_project": {"name": "stolen"},
    "update_service_account": {"name": "stolen"},
    "update_key": {"scopes": ["annotate"]},
    "update_user": {"role": "owner"},
    "create_member": {"user_id": "USER", "role": "owner"},
    "update_member": {"role": "owner"},
    "update_group": {"name": "stolen"},
    "create_group_user": {"user_id": "USER"},
    "create_project_group": {"group_id": "GROUP", "role": "owner"},
    "create_project_role": {"role_name": "thief", "permissions": ["annotate"]},
    "update_role": {"role_name": "thief"},
    "update_project_role": {"role_name": "thief"},
    "update_project_spend_limit": {"threshold_amount": 1, "currency": "EUR", "interval": "month"},
    "create_project_spend_alert": ALERT,
    "update_project_spend_alert": ALERT,
    "update_spend_alert": ALERT,
    "assign_user_role": {"role_id": "role_organization_owner"},
    "assign_group_role": {"role_id": "role_organization_owner"},
    "assign_project_user_role": {"role_id": "role_project_owner"},
    "assign_project_group_role": {"role_id": "role_project_owner"},
}


class World:
    """One organization with one of everything, and another with a key that may do everything there."""

    def __init__(self, store: Store, server: Server, accounts: Accounts) -> None:
        self.store, self.server, self.accounts = store, server, accounts
        self.project = accounts.projects.create(DEFAULT, "secret").id
        self.user = accounts.users.add(DEFAULT, "ada@example.org", "Ada", "owner").id
        self.group = accounts.groups.create(DEFAULT, "crew").id
        accounts.groups.add(DEFAULT, self.group, self.user)
        accounts.groups.join(DEFAULT, self.project, self.group, "member")
        accounts.users.join(DEFAULT, self.project, self.user, "member")
        self.role = accounts.roles.create(DEFAULT, None, "keeper", ["keys.read"]).id
        self.project_role = accounts.roles.create(DEFAULT, self.project, "scribe", ["annotate"]).id
        for kind, holder in (("user", self.user), ("group", self.group)):
            accounts.roles.assign(DEFAULT, None, kind, holder, self.role)
            accounts.roles.assign(DEFAULT, self.project, kind, holder, self.project_role)
        self.key, _ = accounts.keys.create(self.project, "key")
        self.account = accounts.service_accounts.list(DEFAULT, self.project).items[0].id
        self.admin_key, _ = accounts.keys.create_admin(DEFAULT, "root")
        self.invite = accounts.invites.create(DEFAULT, "bob@example.org", "owner")[0].id
        wish = Wish(1, "month", ("ada@example.org",))
        self.alert = accounts.spend_alerts.create(DEFAULT, scope("organization", DEFAULT), wish).id
        self.project_alert = accounts.spend_alerts.create(DEFAULT, scope("project", self.project), wish).id
        self.invoice = accounts.invoices.issue(DEFAULT, "2025-10").id
        self.other = accounts.projects.found("other").id
        self.mine = accounts.projects.create(self.other, "mine").id
        self.my_group = accounts.groups.create(self.other, "mine").id
        _, self.intruder = accounts.keys.create_admin(self.other, "intruder")

    def ids(self, path: str) -> dict[str, str]:
        return {
            "project_id": self.project,
            "service_account_id": self.account,
            "api_key_id": self.key,
            "key_id": self.admin_key,
            "user_id": self.user,
            "group_id": self.group,
            "role_id": self.project_role if "/projects/" in path else self.role,
            "invite_id": self.invite,
            "alert_id": self.project_alert if "/projects/" in path else self.alert,
            "invoice_id": self.invoice,
            "rate_limit_id": "rl-echo",
            "holder_id": self.user if "/users/" in path else self.group,
        }

    def ask(self, method: str, path: str, body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.intruder}"}
        return httpx.request(method, f"{self.server.url}{path}", headers=headers, json=body, timeout=30)

    def rows(self) -> dict[str, list[Any]]:
        """All that is stored, but when keys were used."""
        with self.store.read() as connection:
            tables = {table.name: connection.execute(sa.select(table)).mappings().all() for table in metadata.sorted_tables}
        return {name: [{k: v for k, v in row.items() if k != "last_used_at"} for row in rows] for name, rows in tables.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('world')}/mmaas.db")
    store.migrate()
    accounts = Accounts(store, b"pepper")
    with serving(tenancy=Tenancy(accounts)) as server:
        yield World(store, server, accounts)
    store.close()


CASES = [
    (method, route.path, route.endpoint.__name__ if "holder" not in route.path else route.name)
    for route in routes
    if "{" in route.path
    for method in sorted(route.methods)
]


def leaks(world: World) -> list[str]:
    """Routes that answer about the objects of another organization as they don't about what isn't there."""
    found = []
    for method, path, name in CASES:
        given = BODIES.get(name, {})
        answers = []
        for ids in (world.ids(path), {key: f"{value[:-4]}zzzz" for key, value in world.ids(path).items()}):
            body = {key: {"USER": ids["user_id"], "GROUP": ids["group_id"]}.get(str(value), value) for key, value in given.items()}
            answer = world.ask(method, path.format(**ids), body)
            answers.append((answer.status_code, answer.text))
        if answers[0] != answers[1] or answers[0][0] != 404:
            found.append(f"{method} {path}: {answers}")
    return found


def test_objects_of_another_organization_answer_like_those_that_do_not_exist(world: World) -> None:
    assert len(CASES) > 55
    before = world.rows()
    assert leaks(world) == []
    assert world.rows() == before


def test_what_a_body_names_of_another_organization_is_not_there_either(world: World) -> None:
    for path, body in (
        (f"/v1/organization/projects/{world.mine}/users", {"user_id": world.user, "role": "owner"}),
        (f"/v1/organization/projects/{world.mine}/users", {"email": "ada@example.org", "role": "owner"}),
        (f"/v1/organization/projects/{world.mine}/groups", {"group_id": world.group, "role": "owner"}),
        (f"/v1/organization/groups/{world.my_group}/users", {"user_id": world.user}),
        (f"/v1/organization/groups/{world.my_group}/roles", {"role_id": world.role}),
        ("/v1/organization/admin_api_keys", {"name": "spy", "user_id": world.user}),
        (
            "/v1/organization/invites",
            {"email": "e@example.org", "role": "reader", "projects": [{"id": world.project, "role": "owner"}]},
        ),
    ):
        before = world.rows()
        assert world.ask("POST", path, body).status_code == 404, path
        assert world.rows() == before
    answer = world.ask("GET", f"/v1/organization/projects?after={world.project}", None)
    assert answer.status_code == 400
    assert re.sub(r"proj_\w+", "", answer.text) == world.ask("GET", "/v1/organization/projects?after=proj_none", None).text


def test_the_matrix_finds_a_lookup_that_forgets_the_organization(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(connection: sa.Connection, organization: str, project: str) -> projects.Project:
        row = connection.execute(sa.select(projects.projects).where(projects.projects.c.id == project)).one_or_none()
        if row is None:
            raise NotFound("There is no such project.")
        return projects.Project(row.id, row.organization_id, row.name, row.created_at, row.archived_at)

    monkeypatch.setattr(projects, "find", careless)
    assert any("/projects/{project_id}:" in leak for leak in leaks(world))
