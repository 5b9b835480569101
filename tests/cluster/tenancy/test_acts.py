"""Every verb of every noun, on SQLite and on Postgres: what it changes is recorded in the transaction that changes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa

from cluster.adapters import Catalog
from cluster.desired import Desired
from cluster.store import Store
from cluster.tenancy import periods
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.audit import Audit, Wanted
from cluster.tenancy.chain import Actor
from cluster.tenancy.consents import Consent
from cluster.tenancy.prices import parse
from cluster.tenancy.projects import DEFAULT
from cluster.tenancy.rate_limits import RateLimit
from cluster.types import Adapter, Deployment
from tests.cluster.tenancy.conftest import Clock
from tests.cluster.tenancy.watching import rows, watching

ADA = Actor("session", "ada@host", address="10.0.0.1")
PRICES = parse('{"fee": "3"}')
MONTH = periods.month_text(periods.month_of(Clock().now) - 1)


@dataclass
class Office:
    """One of everything, made by who acts, in `steps` that can be watched one by one."""

    accounts: Accounts
    desired: Desired
    catalog: Catalog
    made: dict[str, Any] = field(default_factory=dict)

    def steps(self) -> Iterator[tuple[list[str], Callable[[], object]]]:
        """The actions that each step's records have, and the step."""
        yield from self._places()
        yield from self._people()
        yield from self._keys()
        yield from self._bounds()
        yield from self._money()
        yield from self._ends()

    def _keep(self, name: str, make: Callable[[], Any]) -> Callable[[], object]:
        return lambda: self.made.update({name: make()})

    def _assign(self, verb: Callable[..., object], kind: str, project: str | None, role: str) -> None:
        verb(DEFAULT, self.made[project] if project else None, kind, self.made[kind], self.made[role])

    def _places(self) -> Iterator[tuple[list[str], Callable[[], object]]]:
        to, made = self.accounts, self.made
        yield ["organization.created"], lambda: to.projects.found("other")
        yield ["project.created"], self._keep("project", lambda: to.projects.create(DEFAULT, "web").id)
        yield ["project.updated"], lambda: to.projects.rename(DEFAULT, made["project"], "site")
        create = to.service_accounts.create
        yield ["service_account.created"], self._keep("account", lambda: create(DEFAULT, made["project"], "bot").id)
        update = to.service_accounts.update
        yield ["service_account.updated"], lambda: update(DEFAULT, made["project"], made["account"], role="owner")

    def _people(self) -> Iterator[tuple[list[str], Callable[[], object]]]:
        to, made = self.accounts, self.made
        yield ["user.added"], self._keep("user", lambda: to.users.add(DEFAULT, "ada@example.org", "Ada", "owner").id)
        yield ["user.updated"], lambda: to.users.set_role(DEFAULT, made["user"], "reader")
        yield ["user.added"], lambda: to.users.join(DEFAULT, made["project"], made["user"], "member")
        yield ["user.updated"], lambda: to.users.set_member_role(DEFAULT, made["project"], made["user"], "owner")
        yield ["group.created"], self._keep("group", lambda: to.groups.create(DEFAULT, "crew").id)
        yield ["group.updated"], lambda: to.groups.rename(DEFAULT, made["group"], "team")
        yield ["group.user.added"], lambda: to.groups.add(DEFAULT, made["group"], made["user"])
        yield ["project.group.added"], lambda: to.groups.join(DEFAULT, made["project"], made["group"], "member")
        yield ["role.created"], self._keep("role", lambda: to.roles.create(DEFAULT, None, "keeper", ["keys.read"]).id)
        yield ["role.updated"], lambda: to.roles.update(DEFAULT, None, made["role"], name="warden", granted=["keys.write"])
        inside = ("scribe", ["annotate"])
        yield ["role.created"], self._keep("scribe", lambda: to.roles.create(DEFAULT, made["project"], *inside).id)
        for kind in ("user", "group"):
            give, take = (partial(self._assign, verb, kind) for verb in (to.roles.assign, to.roles.take))
            yield ["role.assignment.created"], partial(give, None, "role")
            yield ["role.assignment.created"], partial(give, "project", "scribe")
            yield ["role.assignment.deleted"], partial(take, None, "role")
            yield ["role.assignment.created"], partial(give, None, "role")
        invite = to.invites.create
        yield (
            ["invite.sent"],
            self._keep("invite", lambda: invite(DEFAULT, "bob@example.org", "reader", {made["project"]: "member"})),
        )
        yield ["user.added", "user.added", "invite.accepted"], lambda: to.invites.accept(made["invite"][1], "Bob")
        yield ["invite.sent"], self._keep("invite", lambda: invite(DEFAULT, "eve@example.org", "reader"))
        yield ["invite.deleted"], lambda: to.invites.delete(DEFAULT, made["invite"][0].id)

    def _keys(self) -> Iterator[tuple[list[str], Callable[[], object]]]:
        keys, made = self.accounts.keys, self.made
        yield ["service_account.created", "api_key.created"], self._keep("key", lambda: keys.create(made["project"], "key")[0])
        yield ["api_key.created"], lambda: keys.create(made["project"], "own", user=made["user"])
        change = {"scopes": ["annotate"], "models": ["chat"], "expires_at": Clock().now + 60}
        yield ["api_key.updated"], lambda: keys.update(DEFAULT, made["project"], made["key"], **change)  # type: ignore[arg-type]
        yield ["api_key.created", "api_key.updated"], self._keep("next", lambda: keys.rotate(made["key"])[0])
        yield ["api_key.deleted"], lambda: keys.revoke(made["next"])
        yield ["api_key.created"], self._keep("admin", lambda: keys.create_admin(DEFAULT, "root", user=made["user"])[0])
        yield ["api_key.deleted"], lambda: keys.revoke(made["admin"])

    def _bounds(self) -> Iterator[tuple[list[str], Callable[[], object]]]:
        to, made = self.accounts, self.made
        for requests in (5, 6):
            yield ["rate_limit.updated"], lambda n=requests: to.rate_limits.put(RateLimit(made["project"], "chat", requests=n))  # type: ignore[misc]
        yield ["rate_limit.deleted"], lambda: to.rate_limits.put(RateLimit(made["project"], "chat"))
        for models in (["chat"], ["code"]):
            yield ["project.updated"], lambda m=models: to.model_permissions.put(made["project"], "allow_list", m)  # type: ignore[misc]
        yield ["project.updated"], lambda: to.model_permissions.delete(made["project"])
        for share in (0.5, 0.0):
            yield ["project.updated"], lambda s=share: to.consents.put(Consent(DEFAULT, s))  # type: ignore[misc]
        for version in (1, 2):
            yield ["model.deployed"], lambda v=version: self.desired.put(Deployment("chat", f"models:/chat/{v}"))  # type: ignore[misc]
            yield ["adapter.added"], lambda v=version: self.catalog.put(Adapter("chat", "german", f"{v}" * 64))  # type: ignore[misc]
        yield ["adapter.removed"], lambda: self.catalog.delete("chat", "german")
        yield ["model.undeployed"], lambda: self.desired.delete("chat")

    def _money(self) -> Iterator[tuple[list[str], Callable[[], object]]]:
        to, made = self.accounts, self.made
        yield ["prices.published"], lambda: to.prices.publish("gold", PRICES)
        yield ["plan.subscribed"], lambda: to.prices.subscribe(DEFAULT, "gold")
        for kind in ("organization", "project", "key"):
            name = {"organization": DEFAULT, "project": "project", "key": "key"}[kind]
            of = (lambda k, n: lambda micro: to.budgets.set(k, made.get(n, n), "day", micro))(kind, name)
            for micro in (10, 20):
                yield ["budget.updated"], lambda of=of, micro=micro: of(micro)  # type: ignore[misc]
            yield ["budget.deleted"], lambda of=of: of(None)  # type: ignore[misc]
        yield ["credit.granted"], lambda: to.credits.grant(DEFAULT, 5, "welcome")
        yield ["invoice.issued"], lambda: to.invoices.issue(DEFAULT, MONTH)

    def _ends(self) -> Iterator[tuple[list[str], Callable[[], object]]]:
        to, made = self.accounts, self.made
        yield ["project.group.removed", "role.assignment.deleted"], lambda: to.groups.leave(DEFAULT, made["project"], made["group"])
        yield ["project.group.added"], lambda: to.groups.join(DEFAULT, made["project"], made["group"], "member")
        yield ["group.user.removed"], lambda: to.groups.remove(DEFAULT, made["group"], made["user"])
        yield ["group.user.added"], lambda: to.groups.add(DEFAULT, made["group"], made["user"])
        yield ["user.deleted", "role.assignment.deleted"], lambda: to.users.leave(DEFAULT, made["project"], made["user"])
        yield ["user.added"], lambda: to.users.join(DEFAULT, made["project"], made["user"], "member")
        gone = ["user.deleted", "group.user.removed", "role.assignment.deleted", "user.deleted"]
        yield gone, lambda: to.users.remove(DEFAULT, made["user"])
        yield (
            ["project.group.removed", "role.assignment.deleted", "group.deleted"],
            lambda: to.groups.delete(DEFAULT, made["group"]),
        )
        yield ["role.deleted"], lambda: to.roles.delete(DEFAULT, None, made["role"])
        yield ["role.deleted"], lambda: to.roles.delete(DEFAULT, made["project"], made["scribe"])
        yield ["service_account.deleted"], lambda: to.service_accounts.delete(DEFAULT, made["project"], made["account"])
        yield ["project.archived"], lambda: to.projects.archive(DEFAULT, made["project"])


class Broken(Exception):
    """The log can't be written."""


@pytest.fixture
def audit(either_store: Store, clock: Clock) -> Audit:
    return Audit(either_store, bytes(32), clock)


@pytest.fixture
def office(either_store: Store, audit: Audit, clock: Clock) -> Office:
    note = audit.by(ADA, "req_1")
    accounts = Accounts(either_store, b"pepper", clock, audit).by(ADA, "req_1")
    return Office(accounts, Desired(either_store, clock, note), Catalog(either_store, clock, note))


def test_each_verb_records_what_it_changes_and_nothing_else(either_store: Store, audit: Audit, office: Office) -> None:
    for actions, step in office.steps():
        with watching(either_store, audit) as seen:
            step()
        assert seen.actions == actions
        seen.check()
        assert {(record.actor, record.request_id) for record in seen.records} == {(ADA, "req_1")}
        places = {record.organization for record in seen.records}
        if actions[0].partition(".")[0] in ("model", "adapter", "prices"):
            assert places == {""}, "of the whole platform"
        elif actions != ["organization.created"]:
            assert places == {DEFAULT}, actions
    verdict = audit.verify()
    assert verdict.problems == ()
    assert verdict.records == sum(len(actions) for actions, _ in office.steps())


def test_who_writes_nothing_down_changes_nothing(
    either_store: Store, audit: Audit, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each verb first with a log that breaks at its last record, then as it should be."""
    many, written = 0, Audit.record

    def breaking(self: Audit, *facts: Any, **where: Any) -> Any:
        nonlocal many
        made = written(self, *facts, **where)
        many -= 1
        if many == 0:
            raise Broken
        return made

    for actions, step in office.steps():
        with monkeypatch.context() as patch:
            many = len(actions)
            patch.setattr(Audit, "record", breaking)
            before, head = rows(either_store), audit.head()
            with pytest.raises(Broken):
                step()
            assert (rows(either_store), audit.head()) == (before, head), actions
        step()


def test_before_and_after_hold_no_secret(either_store: Store, audit: Audit, office: Office) -> None:
    for _, step in office.steps():
        step()
    _, text = office.accounts.keys.create_admin(DEFAULT, "last")
    _, token = office.accounts.invites.create(DEFAULT, "last@example.org", "reader")
    with either_store.read() as connection:
        digests = list(connection.scalars(sa.text("SELECT digest FROM api_keys UNION SELECT digest FROM invites")))
    log = repr(list(audit.records()))
    assert "api_key.created" in log
    for secret in (text, text[15:40], token, *(form for d in digests for form in (bytes(d).hex(), repr(bytes(d))))):
        assert secret not in log


def test_what_is_recorded_is_found_by_project_and_target(office: Office, audit: Audit) -> None:
    for _, step in office.steps():
        step()
    project = office.made["project"]
    inside = {record.action for record in audit.list(Wanted(DEFAULT, projects=[project]), limit=1000)[0]}
    assert inside >= {
        "project.created",
        "service_account.created",
        "api_key.created",
        "user.added",
        "rate_limit.updated",
        "role.created",
    }
    [limit, *_] = audit.list(Wanted(targets=["rl-chat"]), limit=10)[0]
    assert (limit.action, limit.project) == ("rate_limit.deleted", project)
    admin = [record for record in audit.list(Wanted(actions=["api_key.created"]), limit=100)[0] if record.project is None]
    assert [record.target for record in admin] == [office.made["admin"]], "an admin key is no project's"


def test_an_act_that_changes_nothing_leaves_no_record(either_store: Store, audit: Audit, office: Office) -> None:
    to = office.accounts
    project = to.projects.create(DEFAULT, "web").id
    key, _ = to.keys.create(project, "key")
    to.keys.revoke(key)
    to.projects.archive(DEFAULT, project)
    with watching(either_store, audit) as seen:
        to.keys.revoke(key)
        to.projects.archive(DEFAULT, project)
        to.model_permissions.delete(project)
        to.rate_limits.put(RateLimit(project))
    assert (seen.records, seen.changed) == ([], [])


def test_nobody_changes_anything_without_saying_who(either_store: Store, audit: Audit, clock: Clock) -> None:
    accounts = Accounts(either_store, b"pepper", clock, audit)
    assert accounts.projects.list(DEFAULT).items
    before = rows(either_store)
    with pytest.raises(RuntimeError, match=r"project\.created: say who acts"):
        accounts.projects.create(DEFAULT, "web")
    assert rows(either_store) == before


def test_a_users_key_acts_in_the_name_of_the_user(either_store: Store, audit: Audit, office: Office, clock: Clock) -> None:
    user = office.accounts.users.add(DEFAULT, "ada@example.org", "Ada", "owner").id
    key, _ = office.accounts.keys.create_admin(DEFAULT, "hers", user=user)
    Accounts(either_store, b"pepper", clock, audit).by(Actor("api_key", key)).projects.create(DEFAULT, "web")
    assert audit.list(Wanted(emails=["ada@example.org"]), limit=10)[0][0].action == "project.created"


def test_many_act_at_once_and_the_log_stays_one_chain(either_store: Store, audit: Audit, office: Office) -> None:
    """Acts of several rows and records each, in circles of each other's rows."""
    to, failed = office.accounts, []
    groups = [to.groups.create(DEFAULT, f"g{number}").id for number in range(4)]
    users = [to.users.add(DEFAULT, f"u{number}@example.org", "U", "reader").id for number in range(4)]
    for group in groups:
        for user in users:
            to.groups.add(DEFAULT, group, user)

    def end(verb: Callable[[str, str], None], names: list[str]) -> None:
        try:
            for name in names:
                verb(DEFAULT, name)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=end, args=work) for work in ((to.groups.delete, groups), (to.users.remove, users[::-1]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    actions = [record.action for record in audit.records()]
    assert (actions.count("group.user.removed"), actions.count("group.deleted"), actions.count("user.deleted")) == (16, 4, 4)
    assert audit.verify().problems == ()


def test_a_change_that_is_not_told_is_found(either_store: Store, audit: Audit, clock: Clock) -> None:
    """What watches here is watched, too."""
    silent = Accounts(either_store, b"pepper", clock)
    with watching(either_store, audit) as seen:
        silent.projects.create(DEFAULT, "web")
        audit.record(ADA, "project.created", "x", None, {"name": "another"})
    with pytest.raises(AssertionError):
        seen.check()
