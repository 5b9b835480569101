"""The administration API through the official client; `test_conformance.py` holds each answer against the published document."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.resources.admin.organization import Organization as Administration

from cluster.errors import ModelNotFound
from cluster.settings import GatewaySettings
from cluster.store import Store
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.projects import DEFAULT
from deployments.gateway import calls
from deployments.gateway.app import router
from deployments.gateway.entrance import Entrance
from deployments.gateway.openai.admin.routes import routes
from deployments.gateway.scopes import PUBLIC, ScopedRoute
from deployments.gateway.tenancy import Tenancy
from tests.deployments.gateway.conftest import Server, eventually, serving
from tests.fakes import EchoModels

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "one two"}]}


class Office:
    def __init__(self, server: Server, accounts: Accounts, admin_key: str) -> None:
        self.server, self.accounts, self.admin_key = server, accounts, admin_key
        self._root = self.client()

    def client(self, key: str | None = None, *, admin: str | None = None) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.server.url}/v1",
            api_key=key or "mk_none",
            admin_api_key=admin or self.admin_key,
            max_retries=0,
            timeout=30,
            _strict_response_validation=True,
        )

    @property
    def organization(self) -> Administration:
        return self._root.admin.organization

    def close(self) -> None:
        self._root.close()

    def call(self, method: str, path: str, key: str, body: Any = None) -> httpx.Response:
        url = self.server.url + (path if path.startswith("/v2") else f"/v1{path}")
        return httpx.request(method, url, headers={"Authorization": f"Bearer {key}"}, json=body, timeout=30)


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('office')}/mmaas.db")
    store.migrate()
    accounts = Accounts(store, b"pepper")
    _, admin_key = accounts.keys.create_admin(DEFAULT, "root", ["organization"])
    with serving(tenancy=Tenancy(accounts)) as server:
        office = Office(server, accounts, admin_key)
        yield office
        office.close()
    store.close()


def test_projects(office: Office) -> None:
    projects = office.organization.projects
    made = projects.create(name="web")
    assert projects.retrieve(made.id).name == "web"
    assert projects.update(made.id, name="site").name == "site"
    assert {project.id for project in projects.list(limit=1)} == {made.id, DEFAULT}, "pages follow each other"
    assert projects.archive(made.id).status == "archived"
    assert made.id not in {project.id for project in projects.list()}
    assert made.id in {project.id for project in projects.list(include_archived=True)}


def test_service_accounts_and_their_keys(office: Office) -> None:
    projects = office.organization.projects
    project = projects.create(name="bots").id
    bot = projects.service_accounts.create(project, name="bot")
    assert bot.api_key
    assert projects.service_accounts.retrieve(bot.id, project_id=project).name == "bot"
    assert projects.service_accounts.update(bot.id, project_id=project, name="robot", role="owner").role == "owner"
    bare = projects.service_accounts.create(project, name="bare", create_service_account_only=True)
    assert bare.api_key is None
    extra = projects.service_accounts.api_keys.create(bare.id, project_id=project, name="extra", expires_in_seconds=60)
    assert extra.expires_at
    assert {one.id for one in projects.service_accounts.list(project, limit=1)} == {bot.id, bare.id}
    with office.client(bot.api_key.value) as caller:
        assert caller.chat.completions.create(**CHAT).choices[0].message.content == "one two"
    keys = {key.id: key for key in projects.api_keys.list(project, limit=1)}
    assert set(keys) == {bot.api_key.id, extra.id}
    assert keys[bot.api_key.id].last_used_at
    owner = keys[extra.id].owner.service_account
    assert owner
    assert owner.id == bare.id
    assert projects.service_accounts.delete(bare.id, project_id=project).deleted
    assert [key.id for key in projects.api_keys.list(project, owner_project_access="inactive")] == [extra.id]
    assert projects.api_keys.retrieve(extra.id, project_id=project).owner_project_access == "inactive"
    assert projects.api_keys.delete(extra.id, project_id=project).deleted
    with pytest.raises(openai.NotFoundError):
        projects.api_keys.retrieve(extra.id, project_id=project)


def test_a_revoked_key_dies_within_a_second(office: Office) -> None:
    projects = office.organization.projects
    bot = projects.service_accounts.create(DEFAULT, name="short")
    assert bot.api_key
    with office.client(bot.api_key.value) as caller:
        caller.models.list()
        projects.api_keys.delete(bot.api_key.id, project_id=DEFAULT)
        ended = time.monotonic()
        while time.monotonic() - ended < 5:
            try:
                caller.models.list()
            except openai.AuthenticationError:
                break
            last = time.monotonic() - ended
            time.sleep(0.02)
        else:
            pytest.fail("the key never died")
    assert last <= 1.0


def test_a_key_calls_only_the_models_of_its_list(office: Office) -> None:
    accounts = office.organization.projects.service_accounts
    bot = accounts.create(DEFAULT, name="choosy", extra_body={"models": ["other"]})
    assert bot.api_key
    with office.client(bot.api_key.value) as caller:
        assert caller.models.list().data == []
        words = set()
        for model in ("echo", "ghost"):
            with pytest.raises(openai.NotFoundError) as refused:
                caller.chat.completions.create(**{**CHAT, "model": model})
            assert refused.value.code == "model_not_found"
            words.add(str(refused.value).replace(model, "MODEL"))
            with pytest.raises(openai.NotFoundError):
                caller.embeddings.create(model=model, input="one")
            with pytest.raises(openai.NotFoundError):
                caller.models.retrieve(model)
        assert len(words) == 1, "what exists and what doesn't read the same"
    keys = office.organization.projects.api_keys
    changed = keys.update(bot.api_key.id, project_id=DEFAULT, scopes=["inference"], extra_body={"models": ["echo"]})
    assert changed.model_extra
    assert changed.model_extra["models"] == ["echo"]

    def may_call() -> bool:
        with office.client(bot.api_key.value) as caller:
            return [model.id for model in caller.models.list()] == ["echo"]

    eventually(may_call)


async def test_a_handle_holds_a_key_to_its_models(office: Office) -> None:
    entrance = Entrance.of(EchoModels(), office.accounts.keys.verify, GatewaySettings())
    _, text = office.accounts.keys.create(DEFAULT, "choosy", models=["other"])
    with pytest.raises(ModelNotFound):
        [part async for part in calls.call(entrance, text, "chat.completions", CHAT)]
    [listed] = [part async for part in calls.call(entrance, text, "models.list", {})]
    assert listed["data"] == []


def test_rotation_over_http(office: Office) -> None:
    bot = office.organization.projects.service_accounts.create(DEFAULT, name="turning")
    assert bot.api_key
    path = f"/organization/projects/{DEFAULT}/api_keys/{bot.api_key.id}/rotate"
    new = office.call("POST", path, office.admin_key, {"overlap_seconds": 60}).json()
    for key in (bot.api_key.value, new["value"]):
        assert office.accounts.keys.verify(key).tenant == DEFAULT
    assert office.call("POST", path, office.admin_key).status_code == 409
    assert office.call("POST", path, office.admin_key).headers["x-should-retry"] == "false"


def test_admin_keys(office: Office) -> None:
    keys = office.organization.admin_api_keys
    made = keys.create(name="second", expires_in_seconds=3600)
    assert keys.retrieve(made.id).redacted_value.startswith(f"mk_{made.id}")
    assert made.id in {key.id for key in keys.list(limit=1)}
    rotated = office.call("POST", f"/organization/admin_api_keys/{made.id}/rotate", office.admin_key, {}).json()
    with office.client(admin=rotated["value"]) as second:
        assert second.admin.organization.projects.retrieve(DEFAULT).id == DEFAULT
    assert keys.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        keys.retrieve(made.id)


def test_people_groups_and_roles(office: Office) -> None:
    organization = office.organization
    project = organization.projects.create(name="people").id
    invite = organization.invites.create(email="ada@example.org", role="reader", projects=[{"id": project, "role": "member"}])
    assert organization.invites.retrieve(invite.id).status == "pending"
    dropped = organization.invites.create(email="eve@example.org", role="reader")
    assert {one.id for one in organization.invites.list(limit=1)} == {invite.id, dropped.id}
    assert organization.invites.delete(dropped.id).deleted
    assert invite.model_extra
    ada = office.accounts.invites.accept(invite.model_extra["token"], "Ada").id
    assert organization.invites.retrieve(invite.id).status == "accepted"

    assert organization.users.retrieve(ada).role == "reader"
    assert organization.users.update(ada, role="auditor").role == "auditor"
    assert [user.id for user in organization.users.list(emails=["ada@example.org"])] == [ada]
    assert [user.id for user in organization.users.list(emails=["none@example.org"])] == []

    members = organization.projects.users
    assert members.retrieve(ada, project_id=project).role == "member"
    assert members.update(ada, project_id=project, role="analyst").role == "analyst"
    assert members.delete(ada, project_id=project).deleted
    assert members.create(project, email="ada@example.org", role="developer").id == ada
    assert [member.id for member in members.list(project)] == [ada]

    group = organization.groups.create(name="crew")
    assert organization.groups.retrieve(group.id).name == "crew"
    assert organization.groups.update(group.id, name="team").name == "team"
    organization.groups.create(name="another")
    assert len(list(organization.groups.list(limit=1, order="desc"))) == 2
    assert organization.groups.users.create(group.id, user_id=ada).user_id == ada
    assert organization.groups.users.retrieve(ada, group_id=group.id).name == "Ada"
    assert [user.id for user in organization.groups.users.list(group.id)] == [ada]
    inside = organization.projects.groups
    assert inside.create(project, group_id=group.id, role="member").group_name == "team"
    assert inside.retrieve(group.id, project_id=project).project_id == project
    assert [one.group_id for one in inside.list(project)] == [group.id]

    role = organization.roles.create(role_name="key keeper", permissions=["keys.read"], description="Looks after keys.")
    assert organization.roles.retrieve(role.id).permissions == ["keys.read"]
    assert organization.roles.update(role.id, role_name="keeper").name == "keeper"
    assert role.id in {one.id for one in organization.roles.list(limit=3)}
    assert organization.users.roles.create(ada, role_id=role.id).user.id == ada
    assert organization.users.roles.retrieve(role.id, user_id=ada).name == "keeper"
    assert [one.id for one in organization.users.roles.list(ada)] == [role.id]
    assert organization.users.roles.delete(role.id, user_id=ada).deleted
    assert organization.groups.roles.create(group.id, role_id=role.id).group.id == group.id
    assert organization.groups.roles.retrieve(role.id, group_id=group.id).id == role.id
    assert [one.id for one in organization.groups.roles.list(group.id)] == [role.id]
    assert organization.groups.roles.delete(role.id, group_id=group.id).deleted

    scribe = organization.projects.roles.create(project, role_name="scribe", permissions=["annotate"])
    assert organization.projects.roles.retrieve(scribe.id, project_id=project).resource_type == "api.project"
    assert organization.projects.roles.update(scribe.id, project_id=project, description="Writes.").description == "Writes."
    assert scribe.id in {one.id for one in organization.projects.roles.list(project)}
    assert members.roles.create(ada, project_id=project, role_id=scribe.id).role.id == scribe.id
    assert members.roles.retrieve(scribe.id, project_id=project, user_id=ada).id == scribe.id
    assert [one.id for one in members.roles.list(ada, project_id=project)] == [scribe.id]
    assert members.roles.delete(scribe.id, project_id=project, user_id=ada).deleted
    assert inside.roles.create(group.id, project_id=project, role_id=scribe.id).role.id == scribe.id
    assert inside.roles.retrieve(scribe.id, project_id=project, group_id=group.id).id == scribe.id
    assert [one.id for one in inside.roles.list(group.id, project_id=project)] == [scribe.id]
    assert inside.roles.delete(scribe.id, project_id=project, group_id=group.id).deleted
    assert organization.projects.roles.delete(scribe.id, project_id=project).deleted

    assert inside.delete(group.id, project_id=project).deleted
    assert organization.groups.users.delete(ada, group_id=group.id).deleted
    assert organization.groups.delete(group.id).deleted
    assert organization.roles.delete(role.id).deleted
    assert organization.users.delete(ada).deleted


def test_project_keys_and_admin_keys_are_two_worlds(office: Office) -> None:
    _, project_key = office.accounts.keys.create(DEFAULT, "caller")
    for route in routes:
        assert isinstance(route, ScopedRoute)
        assert route.scope != PUBLIC
        for method in route.methods:
            path = re.sub(r"\{[^/]*\}", "x", route.path).removeprefix("/v1")
            assert office.call(method, path, project_key, {}).status_code == 403, (method, path)
            assert office.call(method, path, "mk_none", {}).status_code == 401
    for route in router.routes:
        assert isinstance(route, ScopedRoute)
        if route.scope == "inference":
            [method] = route.methods
            path = route.path.replace("{model:path}", "echo").removeprefix("/v1")
            assert office.call(method, path, office.admin_key, CHAT).status_code == 403, path


def test_only_who_operates_the_platform_reads_its_metrics(office: Office) -> None:
    _, operator = office.accounts.keys.create_admin(DEFAULT, "operator", ["admin"])
    url = f"{office.server.url}/metrics"
    assert httpx.get(url, headers={"Authorization": f"Bearer {office.admin_key}"}).status_code == 403
    assert httpx.get(url, headers={"Authorization": f"Bearer {operator}"}).status_code == 200


def test_nobody_gives_or_takes_more_than_they_hold(office: Office) -> None:
    accounts, make = office.accounts, office.accounts.keys.create_admin
    boss = accounts.users.add(DEFAULT, "boss@example.org", "Boss", "owner").id
    clerk = accounts.users.add(DEFAULT, "clerk@example.org", "Clerk", "reader").id
    powerful = accounts.groups.create(DEFAULT, "powerful").id
    accounts.roles.assign(DEFAULT, None, "group", powerful, "role_organization_owner")
    custom = accounts.roles.create(DEFAULT, None, "money", ["billing.write"]).id
    root, _ = make(DEFAULT, "another root", ["organization"])
    _, key = make(
        DEFAULT, "limited", ["users.read", "users.write", "roles.read", "roles.write", "admin_keys.write", "projects.read"]
    )
    refused = [
        ("POST", f"/organization/users/{clerk}", {"role": "owner"}),
        ("POST", f"/organization/users/{boss}", {"role": "reader"}),
        ("DELETE", f"/organization/users/{boss}", None),
        ("POST", f"/organization/users/{clerk}/roles", {"role_id": "role_organization_owner"}),
        ("POST", f"/organization/groups/{powerful}/users", {"user_id": clerk}),
        ("POST", f"/organization/groups/{powerful}/roles", {"role_id": custom}),
        ("DELETE", f"/organization/groups/{powerful}", None),
        ("DELETE", f"/organization/groups/{powerful}/roles/role_organization_owner", None),
        ("POST", "/organization/invites", {"email": "new@example.org", "role": "owner"}),
        ("POST", "/organization/roles", {"role_name": "king", "permissions": ["organization"]}),
        ("POST", f"/organization/roles/{custom}", {"permissions": ["users.read"]}),
        ("DELETE", f"/organization/roles/{custom}", None),
        ("POST", "/organization/admin_api_keys", {"name": "wider", "scopes": ["organization"]}),
        ("POST", "/organization/admin_api_keys", {"name": "wider", "scopes": ["admin"]}),
        ("POST", f"/organization/admin_api_keys/{root}/rotate", {}),
        ("DELETE", f"/organization/admin_api_keys/{root}", None),
    ]
    for method, path, body in refused:
        answer = office.call(method, path, key, body)
        assert answer.status_code == 403, (method, path, answer.text)
        assert answer.json()["error"]["code"] == "insufficient_permissions"
    allowed = office.call("POST", f"/organization/users/{clerk}", key, {"role": "annotator"})
    assert allowed.json()["role"] == "annotator"
    narrow = office.call("POST", "/organization/admin_api_keys", key, {"name": "as wide"}).json()
    assert narrow["scopes"] == sorted(office.accounts.keys.verify(key).scopes)
    assert (
        office.call("POST", "/organization/admin_api_keys", office.admin_key, {"name": "x", "scopes": ["admin"]}).status_code == 403
    )


def test_hostile_parameters_are_refused_politely(office: Office) -> None:
    for value in ("%00", "..%2f..%2fetc", "a" * 500, "%F0%9F%92%A9", "'%20OR%201=1--", "%0d%0ax", "$(id)"):
        for path in (f"/organization/projects/{value}", f"/organization/users/{value}/roles", f"/projects/{value}/roles"):
            assert office.call("GET", path, office.admin_key).status_code in (400, 404), path
        for name in ("after", "limit", "order"):
            assert office.call("GET", f"/organization/users?{name}={value}", office.admin_key).status_code == 400
        assert office.call("GET", f"/organization/users?emails[]={value}", office.admin_key).status_code in (200, 400)
    for body in ({}, {"name": ""}, {"name": 1}, {"name": "a\x00b"}, {"name": "x" * 101}, {"name": None}):
        answer = office.call("POST", "/organization/projects", office.admin_key, body)
        assert answer.status_code == 400
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    for limit in ("0", "101", "-1", "1e9"):
        assert office.call("GET", f"/organization/projects?limit={limit}", office.admin_key).status_code == 400
