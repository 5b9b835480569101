from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import NotFound, StorageError
from cluster.store import Store
from cluster.tenancy import audit as module
from cluster.tenancy import chain
from cluster.tenancy.audit import Audit, Wanted, audit_checkpoints, audit_head, audit_log
from cluster.tenancy.chain import Actor, Head
from tests.cluster.tenancy.conftest import Clock

KEY = bytes(range(32))
SOMEBODY = Actor("api_key", "key_1", "a@example.org", "10.0.0.1")


@pytest.fixture
def store(migrated: Store) -> Store:
    without_guards(migrated)
    with migrated.begin() as connection:
        connection.execute(audit_log.delete())
        connection.execute(audit_checkpoints.delete())
        connection.execute(audit_head.delete())
        connection.execute(audit_head.insert().values(id=1, number=0, digest=bytes(32), at=0.0, signature=b""))
    return migrated


@pytest.fixture
def audit(store: Store, clock: Clock) -> Audit:
    return Audit(store, KEY, clock)


def without_guards(store: Store) -> None:
    """What somebody does first who wants to change the log: the database's own owner can."""
    with store.begin() as connection:
        if store.engine.dialect.name == "sqlite":
            for verb in ("update", "delete"):
                connection.execute(sa.text(f"DROP TRIGGER IF EXISTS audit_log_no_{verb}"))
        else:
            connection.execute(sa.text("DROP TRIGGER IF EXISTS audit_log_append_only ON audit_log"))


def write(audit: Audit, many: int) -> None:
    for i in range(many):
        audit.record(SOMEBODY, "project.updated", f"proj_{i}", {"name": f"n{i}"}, {"name": f"m{i}"}, project=f"proj_{i}")


def found(audit: Audit, *kept: Head) -> list[str]:
    return [f"{problem.number}: {problem.what}" for problem in audit.verify(kept).problems]


def test_a_log_that_nobody_touched_is_true(audit: Audit) -> None:
    assert audit.verify().problems == ()
    write(audit, 5)
    verdict = audit.verify([audit.head()])
    assert (verdict.records, verdict.head.number, verdict.problems) == (5, 5, ())


def test_who_what_before_and_after_come_back(audit: Audit, clock: Clock) -> None:
    audit.record(
        SOMEBODY, "api_key.created", "key_2", None, {"scopes": {"b", "a"}}, organization="org", project="p", request_id="req_1"
    )
    [record] = audit.records()
    assert (record.number, record.at, record.actor, record.action, record.target) == (
        1,
        clock.now,
        SOMEBODY,
        "api_key.created",
        "key_2",
    )
    assert (record.before, record.after) == (None, '{"scopes":["a","b"]}')
    assert (record.organization, record.project, record.request_id) == ("org", "p", "req_1")


def test_an_act_that_fails_leaves_no_record_and_no_gap(audit: Audit, store: Store) -> None:
    def fail() -> None:
        with store.begin() as connection:
            audit.record(SOMEBODY, "project.created", "p", connection=connection)
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail()
    write(audit, 1)
    assert audit.verify().records == 1
    assert found(audit) == []


def test_threads_write_one_chain(audit: Audit) -> None:
    threads = [threading.Thread(target=write, args=(audit, 10)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert audit.verify().records == 60
    assert found(audit) == []


def test_processes_write_one_chain(audit: Audit, store: Store) -> None:
    program = (
        "import sys; from cluster.store import Store; from cluster.tenancy.audit import Audit\n"
        "from cluster.tenancy.chain import Actor\n"
        "audit = Audit(Store(sys.argv[1]), bytes(range(32)))\n"
        "for i in range(10): audit.record(Actor('system', 'test'), 'project.updated', str(i))"
    )
    url = store.url.render_as_string(hide_password=False)
    root = Path(__file__).parents[3]
    started = [subprocess.Popen([sys.executable, "-c", program, url], cwd=root) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert audit.verify().records == 30
    assert found(audit) == []


def test_the_database_refuses_to_change_the_log(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    store = Store(f"sqlite:///{tmp_path}/guarded.db")
    store.migrate()
    write(Audit(store, KEY), 2)
    for change in (audit_log.delete(), audit_log.update().values(action="nothing")):
        with pytest.raises(sa.exc.DatabaseError, match="append-only"), store.begin() as connection:
            connection.execute(change)
    store.close()


def test_postgres_refuses_to_change_the_log(postgres_url: str) -> None:
    store = Store(postgres_url)
    store.downgrade("base")
    store.migrate()
    write(Audit(store, KEY), 2)
    truncate = sa.text("TRUNCATE audit_log")
    for change in (audit_log.delete(), audit_log.update().values(action="nothing"), truncate):
        with pytest.raises(sa.exc.DatabaseError, match="append-only"), store.begin() as connection:
            connection.execute(change)
    store.close()


def tamper(store: Store, *statements: Any) -> None:
    with store.begin() as connection:
        for statement in statements:
            connection.execute(statement)


CHANGES: dict[str, Any] = {
    "at": 5.0,
    "organization": "other",
    "project": None,
    "actor_kind": "system",
    "actor_id": "somebody else",
    "actor_email": None,
    "actor_address": "10.0.0.2",
    "action": "project.created",
    "target": None,
    "before": None,
    "after": '{"name":"other"}',
    "request_id": "req_2",
    "id": "audit_log-other",
    "previous": bytes(32),
    "digest": bytes(32),
}


@pytest.mark.parametrize("column", CHANGES)
def test_a_changed_column_is_found(audit: Audit, store: Store, column: str) -> None:
    write(audit, 4)
    tamper(store, audit_log.update().where(audit_log.c.number == 3).values({column: CHANGES[column]}))
    assert any(line.startswith("3: ") for line in found(audit))


def test_every_column_is_in_the_table_of_changes() -> None:
    assert set(CHANGES) == {column.name for column in audit_log.columns} - {"number"}


def test_a_removed_row_is_found(audit: Audit, store: Store) -> None:
    write(audit, 4)
    tamper(store, audit_log.delete().where(audit_log.c.number == 2))
    assert found(audit)[0] == "3: 1 missing before this record"


def test_a_tail_that_was_cut_off_is_found_by_the_head(audit: Audit, store: Store) -> None:
    write(audit, 4)
    tamper(store, audit_log.delete().where(audit_log.c.number > 2))
    assert found(audit) == ["4: a checkpoint covers this record, but the log has only 2 records: the rest was cut off"]


def test_a_tail_cut_off_with_its_head_put_back_is_found_by_a_head_kept_elsewhere(audit: Audit, store: Store) -> None:
    write(audit, 2)
    old = audit.head()
    write(audit, 2)
    elsewhere = audit.head()
    back = {"number": old.number, "digest": old.digest, "at": old.at, "signature": old.signature}
    tamper(store, audit_log.delete().where(audit_log.c.number > 2), audit_head.update().values(back))
    assert found(audit) == [], "this is why a head is kept elsewhere"
    assert "cut off" in found(audit, elsewhere)[0]


def test_an_emptied_log_is_found_by_a_head_kept_elsewhere(audit: Audit, store: Store) -> None:
    write(audit, 2)
    elsewhere = audit.head()
    fresh = {"number": 0, "digest": bytes(32), "at": 0.0, "signature": b""}
    tamper(store, audit_log.delete(), audit_head.update().values(fresh))
    assert len(found(audit, elsewhere)) == 1


def test_a_chain_written_anew_without_the_key_is_found(audit: Audit, store: Store) -> None:
    write(audit, 4)
    previous, statements = chain.START, []
    for record in audit.records():
        forged = replace(record, action="harmless", previous=previous)
        previous = forged.computed()
        row = {"action": "harmless", "previous": forged.previous, "digest": previous}
        statements.append(audit_log.update().where(audit_log.c.number == record.number).values(row))
    tamper(store, *statements, audit_head.update().values(digest=previous))
    assert found(audit) == ["4: the signature of the checkpoint is not this platform's"]


def test_rows_behind_the_head_are_found(audit: Audit, store: Store) -> None:
    write(audit, 3)
    [*_, last] = audit.records()
    more = replace(last, number=4, id="audit_log-4", previous=last.digest)
    tamper(store, audit_log.insert().values(module._row(replace(more, digest=more.computed()))))
    assert "after the head" in found(audit)[0]


def test_a_lost_head_stops_everything(audit: Audit, store: Store) -> None:
    tamper(store, audit_head.delete())
    with pytest.raises(StorageError, match="lost its head"):
        write(audit, 1)


def test_checkpoints_are_kept_and_prove_their_part(audit: Audit, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECKPOINT_EVERY", 2)
    write(audit, 5)
    assert [head.number for head in audit.checkpoints()] == [2, 4]
    tamper(store, audit_checkpoints.update().where(audit_checkpoints.c.number == 2).values(signature=bytes(64)))
    assert found(audit) == ["2: the signature of the checkpoint is not this platform's"]


def test_another_platforms_key_proves_nothing(audit: Audit, store: Store) -> None:
    write(audit, 1)
    assert found(Audit(store, bytes(32))) == ["1: the signature of the checkpoint is not this platform's"]


def test_pages_go_back_in_time_and_forward_again(audit: Audit) -> None:
    write(audit, 7)
    first, more = audit.list(Wanted(), limit=3)
    assert ([record.number for record in first], more) == ([7, 6, 5], True)
    second, _ = audit.list(Wanted(), limit=3, after=first[-1].id)
    assert [record.number for record in second] == [4, 3, 2]
    last, more = audit.list(Wanted(), limit=3, after=second[-1].id)
    assert ([record.number for record in last], more) == ([1], False)
    back, more = audit.list(Wanted(), limit=2, before=second[-1].id)
    assert ([record.number for record in back], more) == ([4, 3], True)


def test_lists_are_of_one_organization_and_of_what_was_asked(audit: Audit, clock: Clock) -> None:
    audit.record(SOMEBODY, "project.created", "p1", organization="a", project="p1")
    clock.now += 10
    audit.record(Actor("system", "gateway"), "login.failed", organization="b")
    other, _ = audit.list(Wanted(organization="b"), limit=10)
    assert [record.action for record in other] == ["login.failed"]
    with pytest.raises(NotFound):
        audit.list(Wanted(organization="a"), limit=10, after=other[0].id)
    for wanted in (
        Wanted(projects=["p1"]),
        Wanted(actions=["project.created", "x"]),
        Wanted(actors=["key_1"]),
        Wanted(emails=["a@example.org"]),
        Wanted(targets=["p1"]),
        Wanted(until=clock.now),
    ):
        assert [record.target for record in audit.list(wanted, limit=10)[0]] == ["p1"]
    assert [record.target for record in audit.list(Wanted(since=clock.now), limit=10)[0]] == [None]


def test_an_exported_log_is_proved_without_the_database(audit: Audit) -> None:
    write(audit, 3)
    lines = [json.dumps(chain.to_json(thing)) for thing in (*audit.records(), audit.head())]
    *records, head = map(json.loads, lines)
    read = [chain.record_of(plain) for plain in records]
    assert list(chain.problems(read, [chain.head_of(head)], audit.public_key)) == []
    assert list(chain.problems(read[:-1], [chain.head_of(head)], audit.public_key)) != []


def test_strings_that_a_column_can_not_hold_are_made_fit(audit: Audit) -> None:
    long = "\x00\ud800\x1b" + "x" * 500
    audit.record(Actor("api_key", long), long, long, {"a": long}, organization=long, project=long, request_id=long)
    assert found(audit) == []


# The chain itself, against every way to spoil a list. In memory, so that many are tried.


def signed_chain(many: int) -> tuple[list[chain.Record], Head]:
    records, previous = [], chain.START
    for number in range(1, many + 1):
        draft = chain.Record(number, f"id{number}", 1.5 * number, "o", None, SOMEBODY, "act", "t", None, "{}", None, previous)
        records.append(replace(draft, digest=draft.computed()))
        previous = records[-1].digest
    return records, Head(many, previous, 1.0).signed(module.Ed25519PrivateKey.from_private_bytes(KEY))


RECORDS, HEAD = signed_chain(12)
PUBLIC = module.Ed25519PrivateKey.from_private_bytes(KEY).public_key()
TEXT_FIELDS = ("id", "organization", "action", "target", "after", "before", "project", "request_id")


@st.composite
def spoiled(draw: st.DrawFn) -> list[chain.Record]:
    """The records with at least one changed, removed, doubled, moved or cut off."""
    records = list(RECORDS)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(records) - 1)) if records else 0
        match draw(st.sampled_from(["change", "recompute", "remove", "double", "move", "cut"])):
            case "change" if records:
                name = draw(st.sampled_from(TEXT_FIELDS))
                records[place] = replace(records[place], **{name: draw(st.text(max_size=5))})
            case "recompute" if records:
                changed = replace(records[place], at=draw(st.floats(0, 1e9)))
                records[place] = replace(changed, digest=changed.computed())
            case "remove" if records:
                del records[place]
            case "double" if records:
                records.insert(draw(st.integers(0, len(records))), records[place])
            case "move" if records:
                records.insert(draw(st.integers(0, len(records) - 1)), records.pop(place))
            case "cut":
                del records[place:]
    return records


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spoiled())
def test_whatever_is_done_to_the_list_is_found(records: list[chain.Record]) -> None:
    assert (list(chain.problems(records, [HEAD], PUBLIC)) == []) == (records == RECORDS)
