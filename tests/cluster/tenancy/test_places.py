"""Organizations, projects and service accounts: pages, names, ends, and that nobody sees another organization's."""

from __future__ import annotations

import pytest

from cluster.errors import Conflict, InvalidRequest, NotFound, Unauthenticated
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.paging import Asked
from cluster.tenancy.projects import DEFAULT
from tests.cluster.tenancy.conftest import Clock


def test_pages_hold_every_project_once_in_either_order(accounts: Accounts, clock: Clock) -> None:
    for number in range(7):
        clock.now += number % 2  # some at the same time
        accounts.projects.create(DEFAULT, f"project {number}")
    for order in ("asc", "desc"):
        seen: list[str] = []
        asked = Asked(limit=3, order=order)
        while True:
            page = accounts.projects.list(DEFAULT, asked)
            seen += [project.id for project in page.items]
            if not page.has_more:
                break
            asked = Asked(3, seen[-1], order)
        whole = [project.id for project in accounts.projects.list(DEFAULT, Asked(100, None, order)).items]
        assert seen == whole
        assert len(set(seen)) == 8
    times = [project.created_at for project in accounts.projects.list(DEFAULT, Asked(100)).items]
    assert times == sorted(times)


def test_a_page_survives_the_end_of_items(accounts: Accounts) -> None:
    first, second, third = (accounts.projects.create(DEFAULT, name) for name in "abc")
    assert accounts.projects.list(DEFAULT, Asked(after=sorted([first.id, second.id, third.id])[-1])).items == []


def test_after_must_be_of_the_same_list(accounts: Accounts) -> None:
    other = accounts.projects.found("other")
    foreign = accounts.projects.create(other.id, "foreign")
    for after in (foreign.id, "proj_none"):
        with pytest.raises(InvalidRequest) as caught:
            accounts.projects.list(DEFAULT, Asked(after=after))
        assert caught.value.param == "after"
        assert after not in caught.value.message


def test_another_organizations_project_is_not_there(accounts: Accounts) -> None:
    other = accounts.projects.found("other").id
    mine = accounts.projects.create(DEFAULT, "mine").id
    account = accounts.service_accounts.create(DEFAULT, mine, "bot").id
    words = set()
    for project in (mine, "proj_none"):
        for refused in (
            lambda project=project: accounts.projects.get(other, project),
            lambda project=project: accounts.projects.rename(other, project, "stolen"),
            lambda project=project: accounts.projects.archive(other, project),
            lambda project=project: accounts.service_accounts.create(other, project, "spy"),
            lambda project=project: accounts.service_accounts.list(other, project),
            lambda project=project: accounts.service_accounts.get(other, project, account),
            lambda project=project: accounts.service_accounts.update(other, project, account, name="spy"),
            lambda project=project: accounts.service_accounts.delete(other, project, account),
            lambda project=project: accounts.keys.page(other, project),
            lambda project=project: accounts.roles.list(other, project),
            lambda project=project: accounts.users.members(other, project),
            lambda project=project: accounts.groups.of_project(other, project),
        ):
            with pytest.raises(NotFound) as caught:
                refused()
            words.add(caught.value.message)
    assert words == {"There is no such project."}
    assert accounts.projects.get(DEFAULT, mine).name == "mine"
    assert accounts.service_accounts.get(DEFAULT, mine, account).name == "bot"


def test_a_service_account_of_another_project_is_not_there(accounts: Accounts) -> None:
    one, two = (accounts.projects.create(DEFAULT, name).id for name in ("one", "two"))
    account = accounts.service_accounts.create(DEFAULT, one, "bot").id
    with pytest.raises(NotFound):
        accounts.service_accounts.get(DEFAULT, two, account)
    with pytest.raises(NotFound):
        accounts.keys.create(two, "key", service_account=account)


def test_an_archived_project_takes_nothing_new_and_its_keys_end(accounts: Accounts, clock: Clock) -> None:
    project = accounts.projects.create(DEFAULT, "short").id
    _, text = accounts.keys.create(project, "key")
    assert accounts.keys.verify(text).tenant == project
    clock.now += 1000.0
    archived_at = clock.now
    assert accounts.projects.archive(DEFAULT, project).archived_at == archived_at
    clock.now += 1000.0
    assert accounts.projects.archive(DEFAULT, project).archived_at == archived_at
    with pytest.raises(Unauthenticated, match="revoked"):
        accounts.keys.verify(text)
    for refused in (
        lambda: accounts.projects.rename(DEFAULT, project, "again"),
        lambda: accounts.service_accounts.create(DEFAULT, project, "late"),
        lambda: accounts.keys.create(project, "late"),
    ):
        with pytest.raises(Conflict):
            refused()
    assert project not in [one.id for one in accounts.projects.list(DEFAULT).items]
    assert project in [one.id for one in accounts.projects.list(DEFAULT, include_archived=True).items]


def test_the_keys_of_a_deleted_service_account_end(accounts: Accounts) -> None:
    account = accounts.service_accounts.create(DEFAULT, DEFAULT, "bot").id
    key_id, text = accounts.keys.create(DEFAULT, "key", service_account=account)
    assert accounts.keys.get(DEFAULT, DEFAULT, key_id).is_open
    accounts.service_accounts.delete(DEFAULT, DEFAULT, account)
    with pytest.raises(Unauthenticated):
        accounts.keys.verify(text)
    with pytest.raises(NotFound):
        accounts.service_accounts.get(DEFAULT, DEFAULT, account)
    assert [key.id for key in accounts.keys.page(DEFAULT, DEFAULT, has_owner=False).items] == [key_id]
    assert accounts.keys.page(DEFAULT, DEFAULT, has_owner=True).items == []


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 101, "nul\x00"])
def test_names_are_printable_and_short(accounts: Accounts, name: str) -> None:
    with pytest.raises(InvalidRequest):
        accounts.projects.create(DEFAULT, name)
    with pytest.raises(InvalidRequest):
        accounts.service_accounts.create(DEFAULT, DEFAULT, name)
