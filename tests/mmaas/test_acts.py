"""Every command that changes something leaves a record of just that; which ones there are is read from the command line itself."""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer

from cluster import settings
from cluster.adapters import Catalog
from cluster.desired import Desired
from cluster.store import Store
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.audit import Audit
from cluster.tenancy.budgets import scope
from cluster.tenancy.kept_files import KeptCall, KeptFiles
from cluster.tenancy.spend_alerts import Wish
from cluster.types import Adapter, Deployment
from deployments import fleet
from deployments.gateway.exchange import new_request_id
from mmaas import up
from mmaas.audited import accounts_of, audit_of
from mmaas.cli import app, run
from mmaas.commands import adapters
from mmaas.up import opened_store
from tests.cluster.conftest import postgres_url  # noqa: F401 - a fixture
from tests.cluster.tenancy.watching import watching

CHANGES_NOTHING = {
    *("down", "status", "doctor", "plan", "chat", "usage", "train demo", "kept list", "prices list"),
    *("budgets list", "budgets alerts"),
    *("invoice show", "invoice list", "invoice check", "audit list", "audit verify", "audit export"),
    *("adapters list", "keys list", "projects list", "organizations list", "users list"),
}
OUTSIDE = {"sleep", "wake", "kept show"}
"""Acts that change no row: recorded right after they were done, or before what is kept is shown."""

MONTH = "2025-10"
REQUEST = new_request_id()


@contextmanager
def platform() -> Iterator[tuple[Store, Accounts, Audit]]:
    loaded = settings.load()
    with opened_store(loaded) as store:
        yield store, accounts_of(store, loaded), audit_of(store, loaded)


def given(home: Path, tmp_path: Path) -> dict[str, str]:
    """One of everything that a command can be about."""
    with platform() as (store, to, _):
        project, old = (to.projects.create("default", name).id for name in ("web", "old"))
        user = to.users.add("default", "ada@example.org", "Ada", "owner").id
        _, token = to.invites.create("default", "bob@example.org", "reader", {project: "member"})
        key, _ = to.keys.create(project, "key")
        alert = to.spend_alerts.create("default", scope("project", project), Wish(1, "month", ("ada@example.org",))).id
        Desired(store).put(Deployment("chat", str(tmp_path)))
        Catalog(store).put(Adapter("chat", "german", "0" * 64))
    kept = KeptCall(REQUEST, 0.0, "default", "key", "chat.completions", "chat", 200, True, "{}", "{}")
    KeptFiles(home / "kept").write([kept])
    (tmp_path / "prices.json").write_text("{}")
    ids = {"project": project, "old": old, "user": user, "token": token, "key": key, "alert": alert}
    return ids | {"directory": str(tmp_path)}


def commands(has: dict[str, str]) -> dict[str, list[list[str]]]:
    """Each command that changes something, with the words that it is tried with."""
    prices = f"{has['directory']}/prices.json"
    return {
        "deploy": [["deploy", "code", "--model", has["directory"]], ["deploy", "chat", "--model", has["directory"], "--tp", "2"]],
        "sleep": [["sleep", "chat"]],
        "wake": [["wake", "chat"]],
        "adapters add": [["adapters", "add", "french", "--base", "chat", "--path", has["directory"]]],
        "adapters remove": [["adapters", "remove", "german", "--base", "chat"]],
        "undeploy": [["undeploy", "chat"]],
        "organizations create": [["organizations", "create", "other"]],
        "projects create": [["projects", "create", "shop"]],
        "projects archive": [["projects", "archive", has["old"]]],
        "users invite": [["users", "invite", "eve@example.org", "--project", f"{has['project']}=member"]],
        "users accept": [["users", "accept", has["token"], "--name", "Bob"]],
        "users role": [["users", "role", has["user"], "reader"]],
        "keys create": [["keys", "create", "--project", has["project"]], ["keys", "create", "--admin", "--user", has["user"]]],
        "keys rotate": [["keys", "rotate", has["key"]]],
        "keys revoke": [["keys", "revoke", has["key"]]],
        "users remove": [["users", "remove", has["user"]]],
        "prices publish": [["prices", "publish", prices], ["prices", "publish", prices, "--plan", "gold", "--days", "1"]],
        "prices subscribe": [["prices", "subscribe", "gold"]],
        "budgets set": [["budgets", "set", "1", "--name", has["project"]], ["budgets", "set", "none", "--name", has["project"]]],
        "budgets alert": [["budgets", "alert", "1", "--to", "ada@example.org", "--name", has["project"]]],
        "budgets forget": [["budgets", "forget", has["alert"]]],
        "invoice issue": [["invoice", "issue", MONTH]],
        "invoice credit": [["invoice", "credit", "1", "--reason", "sorry"]],
        "kept allow": [["kept", "allow", "default", "--share", "0.5"]],
        "kept show": [["kept", "show", "default", REQUEST]],
        "kept forget": [["kept", "forget", "default"]],
    }


def names(command: Any, before: tuple[str, ...] = ()) -> Iterator[str]:
    for name, one in getattr(command, "commands", {}).items():
        if hasattr(one, "commands"):
            yield from names(one, (*before, name))
        else:
            yield " ".join((*before, name))


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in [name for name in os.environ if name.startswith("MMAAS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MMAAS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fleet, "tell", lambda *_, **__: None)
    monkeypatch.setattr(up.Platform, "admit", lambda *_: None)
    monkeypatch.setattr(up, "reconcile", lambda _: None)
    monkeypatch.setattr(adapters, "_published", lambda *_: "1" * 64)
    return tmp_path / "home"


@pytest.fixture(params=["sqlite", "postgres"])
def either_home(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    if request.param == "postgres":
        monkeypatch.setenv("MMAAS_DATABASE_URL", request.getfixturevalue("postgres_url"))
    yield home
    if request.param == "postgres":
        with platform() as (store, _, _):
            store.downgrade("base")


def test_it_is_known_of_every_command_whether_it_changes_anything() -> None:
    has = dict.fromkeys(("project", "old", "user", "token", "key", "alert", "directory"), "x")
    assert sorted([*CHANGES_NOTHING, *commands(has), "up"]) == sorted(names(typer.main.get_command(app)))


def test_every_command_that_changes_something_is_recorded(
    either_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, tried in commands(given(either_home, tmp_path)).items():
        for words in tried:
            with platform() as (store, _, audit), watching(store, audit) as seen:
                assert run(words) == 0, (words, capsys.readouterr().err)
            if name in OUTSIDE:
                assert len(seen.records) == 1
                assert seen.changed == []
            else:
                seen.check()
            for record in seen.records:
                assert (record.actor.kind, record.actor.id.partition("@")[0]) == ("session", getpass.getuser()), words
    capsys.readouterr()
    assert run(["audit", "verify"]) == 0
    assert "all as they were written" in capsys.readouterr().out


def test_a_command_whose_record_can_not_be_written_changes_nothing(home: Path, tmp_path: Path) -> None:
    """Those that act outside of the store can only tell afterwards."""
    has, append = given(home, tmp_path), Audit._append

    def broken(audit: Audit, connection: Any, draft: Any) -> Any:
        append(audit, connection, draft)
        raise OSError("the log's disk is full")

    for name, [words, *_] in commands(has).items():
        if name in OUTSIDE | {"prices subscribe"}:
            continue  # there is no plan yet
        with platform() as (store, _, audit), watching(store, audit) as seen, pytest.MonkeyPatch.context() as patch:
            patch.setattr(Audit, "_append", broken)
            with pytest.raises(OSError, match="disk is full"):
                run(words)
        assert (seen.records, seen.changed) == ([], []), words


def test_json_of_a_record_has_before_and_after(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    has = given(home, tmp_path)
    assert run(["users", "role", has["user"], "reader"]) == 0
    capsys.readouterr()
    assert run(["audit", "list", "--json", "--limit", "1"]) == 0
    [record] = json.loads(capsys.readouterr().out)
    before, after = json.loads(record["before"]), json.loads(record["after"])
    assert (record["action"], record["organization"], record["target"]) == ("user.updated", "default", has["user"])
    assert {name for name in before if before[name] != after[name]} == {"role_id"}
    assert after["role_id"] == "role_organization_reader"
