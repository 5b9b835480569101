"""Users, groups, roles and invitations, and what a user's key may do at each moment."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from cluster.errors import Conflict, Forbidden, InvalidRequest, NotFound, Unauthenticated
from cluster.tenancy import permissions
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.invites import LIFE_S, invites
from cluster.tenancy.paging import Asked
from cluster.tenancy.permissions import ORGANIZATION, PREDEFINED, PROJECT, READING, expand
from cluster.tenancy.projects import DEFAULT
from tests.cluster.tenancy.conftest import Clock


def user(accounts: Accounts, email: str = "ada@example.org", role: str = "reader", organization: str = DEFAULT) -> str:
    return accounts.users.add(organization, email, "Ada", role).id


def test_a_users_admin_key_does_what_key_and_roles_both_allow(accounts: Accounts) -> None:
    ada = user(accounts, role="auditor")
    _, wide = accounts.keys.create_admin(DEFAULT, "wide", ["admin"], user=ada)
    _, narrow = accounts.keys.create_admin(DEFAULT, "narrow", ["users.read", "users.write"], user=ada)
    assert accounts.keys.verify(wide).scopes == READING
    assert accounts.keys.verify(narrow).scopes == {"users.read"}
    accounts.users.set_role(DEFAULT, ada, "owner")
    assert accounts.keys.verify(wide).scopes == expand({"organization"})
    assert not accounts.keys.verify(wide).can("admin"), "no role operates the platform"
    accounts.users.remove(DEFAULT, ada)
    with pytest.raises(Unauthenticated):
        accounts.keys.verify(wide)


def test_a_users_project_key_follows_membership_by_name_and_by_group(accounts: Accounts) -> None:
    ada = user(accounts)
    with pytest.raises(NotFound):
        accounts.keys.create(DEFAULT, "key", user=ada)
    accounts.users.join(DEFAULT, DEFAULT, ada, "annotator")
    _, text = accounts.keys.create(DEFAULT, "key", ["inference", "annotate"], user=ada)
    assert accounts.keys.verify(text).scopes == {"annotate"}
    group = accounts.groups.create(DEFAULT, "developers").id
    accounts.groups.add(DEFAULT, group, ada)
    accounts.groups.join(DEFAULT, DEFAULT, group, "developer")
    assert accounts.keys.verify(text).scopes == {"annotate", "inference"}
    accounts.users.leave(DEFAULT, DEFAULT, ada)
    assert accounts.keys.verify(text).scopes == {"inference"}
    accounts.groups.remove(DEFAULT, group, ada)
    with pytest.raises(Unauthenticated):
        accounts.keys.verify(text)


def test_custom_roles_are_given_and_taken(accounts: Accounts) -> None:
    ada = user(accounts)
    _, text = accounts.keys.create_admin(DEFAULT, "key", user=ada)
    role = accounts.roles.create(DEFAULT, None, "key keeper", ["keys.read", "keys.write"], "Looks after keys.")
    accounts.roles.assign(DEFAULT, None, "user", ada, role.id)
    accounts.roles.assign(DEFAULT, None, "user", ada, role.id)
    assert accounts.keys.verify(text).scopes == {"projects.read", "keys.read", "keys.write"}
    accounts.roles.update(DEFAULT, None, role.id, granted=["keys.read"])
    assert accounts.keys.verify(text).scopes == {"projects.read", "keys.read"}
    accounts.roles.delete(DEFAULT, None, role.id)
    assert accounts.keys.verify(text).scopes == {"projects.read"}
    with pytest.raises(NotFound):
        accounts.roles.take(DEFAULT, None, "user", ada, role.id)


def test_roles_through_a_group_end_with_the_group(accounts: Accounts) -> None:
    ada = user(accounts)
    _, text = accounts.keys.create_admin(DEFAULT, "key", user=ada)
    group = accounts.groups.create(DEFAULT, "auditors").id
    accounts.groups.add(DEFAULT, group, ada)
    accounts.roles.assign(DEFAULT, None, "group", group, "role_organization_auditor")
    assert accounts.keys.verify(text).scopes == READING
    assert accounts.permissions(DEFAULT, "group", group) == READING
    accounts.groups.delete(DEFAULT, group)
    assert accounts.keys.verify(text).scopes == {"projects.read"}
    assert accounts.permissions(DEFAULT, "user", ada) == {"projects.read"}


def test_a_role_of_one_level_or_place_is_none_of_another(accounts: Accounts) -> None:
    ada, other = user(accounts), accounts.projects.found("other").id
    second = accounts.projects.create(DEFAULT, "second").id
    role = accounts.roles.create(DEFAULT, DEFAULT, "scribe", ["annotate"]).id
    for organization, project in ((DEFAULT, None), (DEFAULT, second), (other, None)):
        with pytest.raises(NotFound):
            accounts.roles.get(organization, project, role)
    with pytest.raises(NotFound):
        accounts.roles.assign(DEFAULT, None, "user", ada, role)
    with pytest.raises(InvalidRequest):
        accounts.users.join(DEFAULT, second, ada, role)
    with pytest.raises(InvalidRequest):
        accounts.roles.create(DEFAULT, DEFAULT, "usurper", ["users.write"])
    with pytest.raises(InvalidRequest):
        accounts.roles.create(DEFAULT, None, "operator", ["admin"])
    accounts.users.join(DEFAULT, DEFAULT, ada, "scribe")
    with pytest.raises(Conflict, match="first"):
        accounts.roles.delete(DEFAULT, DEFAULT, role)


def test_predefined_roles_are_there_and_stay_as_they_are(accounts: Accounts) -> None:
    names = {"owner", "admin", "developer", "analyst", "annotator", "auditor", "billing"}
    assert names <= {role.name for role in accounts.roles.list(DEFAULT, None, Asked(100)).items}
    assert names <= {role.name for role in accounts.roles.list(DEFAULT, DEFAULT, Asked(100)).items}
    with pytest.raises(Conflict):
        accounts.roles.update(DEFAULT, None, "role_organization_owner", name="king")
    with pytest.raises(Conflict):
        accounts.roles.delete(DEFAULT, None, "role_organization_owner")
    with pytest.raises(Conflict):
        accounts.roles.create(DEFAULT, None, "owner", ["users.read"])
    for role in PREDEFINED.values():
        assert role.permissions <= permissions.words(role.level)


def test_roles_page_like_everything_else(accounts: Accounts) -> None:
    made = accounts.roles.create(DEFAULT, None, "last", ["users.read"]).id
    seen: list[str] = []
    while (page := accounts.roles.list(DEFAULT, None, Asked(3, seen[-1] if seen else None))).items:
        seen += [role.id for role in page.items]
        if not page.has_more:
            break
    assert len(seen) == len(set(seen)) == 9
    assert seen[-1] == made
    assert accounts.roles.list(DEFAULT, None, Asked(1, None, "desc")).items[0].id == made


def test_nobody_gives_what_they_do_not_hold() -> None:
    holder = expand({"users.write", "roles.write"})
    permissions.may_grant(holder, {"users.write", *PROJECT})
    permissions.may_grant(expand({"organization"}), ORGANIZATION | {"organization"})
    for granted in ({"billing.write"}, {"organization"}, {"admin"}):
        with pytest.raises(Forbidden):
            permissions.may_grant(holder, granted)
    with pytest.raises(Forbidden):
        permissions.may_grant(expand({"organization"}), {"admin"})


def test_an_address_belongs_to_an_organization_once_at_a_time(accounts: Accounts) -> None:
    ada = user(accounts, "Ada@Example.org")
    assert accounts.users.get(DEFAULT, ada).email == "ada@example.org"
    with pytest.raises(Conflict):
        user(accounts, "ada@example.ORG")
    user(accounts, "ada@example.org", organization=accounts.projects.found("other").id)
    accounts.users.remove(DEFAULT, ada)
    again = user(accounts, "ada@example.org")
    assert [one.id for one in accounts.users.list(DEFAULT, emails=["ADA@example.org"]).items] == [again]
    with pytest.raises(NotFound):
        accounts.users.get(DEFAULT, ada)


@pytest.mark.parametrize("email", ["", "ada", "@x", "a b@x", "a@x\n", "a@b@c", "a\x00@x", "a" * 65 + "@x"])
def test_what_is_no_address_is_refused(accounts: Accounts, email: str) -> None:
    with pytest.raises(InvalidRequest):
        user(accounts, email)


def test_people_of_another_organization_are_not_there(accounts: Accounts) -> None:
    other = accounts.projects.found("other").id
    ada, group = user(accounts), accounts.groups.create(DEFAULT, "group").id
    accounts.groups.add(DEFAULT, group, ada)
    accounts.users.join(DEFAULT, DEFAULT, ada, "member")
    mine = accounts.projects.create(other, "mine").id
    invite, _ = accounts.invites.create(DEFAULT, "bob@example.org", "reader")
    role = accounts.roles.create(DEFAULT, None, "custom", ["users.read"]).id
    theirs = accounts.groups.create(other, "theirs").id
    calls: list[Callable[[], object]] = [
        lambda: accounts.users.get(other, ada),
        lambda: accounts.users.set_role(other, ada, "owner"),
        lambda: accounts.users.remove(other, ada),
        lambda: accounts.users.join(other, mine, ada, "member"),
        lambda: accounts.users.member(other, mine, ada),
        lambda: accounts.users.set_member_role(other, mine, ada, "owner"),
        lambda: accounts.users.leave(other, mine, ada),
        lambda: accounts.groups.get(other, group),
        lambda: accounts.groups.rename(other, group, "taken"),
        lambda: accounts.groups.delete(other, group),
        lambda: accounts.groups.users(other, group),
        lambda: accounts.groups.add(other, theirs, ada),
        lambda: accounts.groups.user(other, theirs, ada),
        lambda: accounts.groups.join(other, mine, group, "member"),
        lambda: accounts.groups.in_project(other, mine, group),
        lambda: accounts.invites.get(other, invite.id),
        lambda: accounts.invites.delete(other, invite.id),
        lambda: accounts.roles.get(other, None, role),
        lambda: accounts.roles.delete(other, None, role),
        lambda: accounts.keys.create_admin(other, "key", user=ada),
    ]
    for call in calls:
        with pytest.raises(NotFound):
            call()
    assert accounts.users.list(other).items == []
    assert [one.id for one in accounts.groups.users(DEFAULT, group).items] == [ada]
    assert [one.user.id for one in accounts.users.members(DEFAULT, DEFAULT).items] == [ada]


def test_an_invitation_is_accepted_once_and_in_time(accounts: Accounts, clock: Clock) -> None:
    later = accounts.projects.create(DEFAULT, "archived before").id
    invite, token = accounts.invites.create(DEFAULT, "Ada@example.org", "auditor", {DEFAULT: "developer", later: "owner"})
    accounts.projects.archive(DEFAULT, later)
    assert len(bytes.fromhex(token)) == 32, "nothing that a command line takes for an option"
    for wrong in ("", token[:-1], token + "x"):
        with pytest.raises(NotFound):
            accounts.invites.accept(wrong, "Ada")
    ada = accounts.invites.accept(token, "Ada")
    assert (ada.email, ada.role_id) == ("ada@example.org", "role_organization_auditor")
    assert [(one.project, one.role_id) for one in accounts.users.memberships(DEFAULT, ada.id)] == [
        (DEFAULT, "role_project_developer")
    ]
    with pytest.raises(NotFound):
        accounts.invites.accept(token, "Eve")
    assert accounts.invites.get(DEFAULT, invite.id).accepted_at == clock.now
    with pytest.raises(Conflict):
        accounts.invites.delete(DEFAULT, invite.id)
    with pytest.raises(Conflict):
        accounts.invites.create(DEFAULT, "ada@example.org", "reader")
    _, late = accounts.invites.create(DEFAULT, "bob@example.org", "reader")
    clock.now += LIFE_S
    with pytest.raises(NotFound):
        accounts.invites.accept(late, "Bob")


def test_an_invitation_makes_one_user_whoever_is_first(accounts: Accounts) -> None:
    _, token = accounts.invites.create(DEFAULT, "ada@example.org", "reader")

    def accepted(number: int) -> bool:
        try:
            accounts.invites.accept(token, f"Ada {number}")
        except NotFound:
            return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert sorted(threads.map(accepted, range(4))) == [False, False, False, True]
    assert len(accounts.users.list(DEFAULT).items) == 1


def test_the_database_holds_no_token_of_an_invitation(accounts: Accounts) -> None:
    _, token = accounts.invites.create(DEFAULT, "ada@example.org", "reader")
    with accounts.invites._store.read() as connection:
        assert token not in str(connection.execute(sa.select(invites)).one())
