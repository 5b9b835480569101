from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from cluster.errors import StorageError
from cluster.store import Store, deployments, metadata

ROW = {"name": "a", "model": "models:/a@b", "tp": 1, "dtype": "float32", "min_replicas": 1, "max_replicas": 1, "created_at": 1.0}


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    sqlite = request.param == "sqlite"
    store = Store(f"sqlite:///{tmp_path}/mmaas.db" if sqlite else request.getfixturevalue("postgres_url"))
    store.migrate()
    yield store
    store.downgrade("base")
    store.close()


def test_migrations_make_exactly_the_declared_tables(store: Store) -> None:
    with store.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        assert set(sa.inspect(connection).get_table_names()) == {*metadata.tables, "alembic_version"}


def test_going_down_leaves_no_table_and_up_again_works(store: Store) -> None:
    store.downgrade("base")
    with store.read() as connection:
        assert set(sa.inspect(connection).get_table_names()) == {"alembic_version"}
    store.migrate()
    with store.begin() as connection:
        connection.execute(deployments.insert().values(ROW))


def test_migrating_twice_keeps_the_rows(store: Store) -> None:
    with store.begin() as connection:
        connection.execute(deployments.insert().values(ROW))
    store.migrate()
    with store.read() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(deployments)) == 1


def test_rows_from_before_quantization_live_through_going_up_and_down(store: Store) -> None:
    store.downgrade("0001")
    old = sa.table("deployments", *[sa.column(name) for name in ROW])
    with store.begin() as connection:
        connection.execute(old.insert().values(ROW))
    store.migrate()
    with store.begin() as connection:
        assert connection.scalar(sa.select(deployments.c.quantization)) is None
        connection.execute(deployments.update().values(quantization="int8"))
    store.downgrade("0001")
    with store.read() as connection:
        assert connection.execute(sa.select(old)).one()._mapping == ROW
    store.migrate()


def test_exception_rolls_back(store: Store) -> None:
    def fail_halfway() -> None:
        with store.begin() as connection:
            connection.execute(deployments.insert().values(ROW))
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    with store.read() as connection:
        assert connection.execute(sa.select(deployments)).all() == []


def test_sqlite_runs_with_a_rollback_journal_and_extra_synchronous(store: Store) -> None:
    if store.engine.dialect.name != "sqlite":
        pytest.skip("SQLite only")
    wanted = {"journal_mode": "persist", "synchronous": 3, "foreign_keys": 1, "busy_timeout": 10000}
    with store.read() as connection:
        assert {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in wanted} == wanted


def test_the_file_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = Store(f"sqlite:///{tmp_path}/new.db")
        store.migrate()
        store.close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.db").stat().st_mode) == 0o600


def test_a_second_writer_waits_for_the_first(store: Store) -> None:
    order: list[str] = []
    holding = threading.Event()
    one_more = deployments.update().values(tp=deployments.c.tp + 1)
    with store.begin() as connection:
        connection.execute(deployments.insert().values(ROW))

    def first() -> None:
        with store.begin() as connection:
            connection.execute(one_more)
            holding.set()
            time.sleep(0.3)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    holding.wait()
    with store.begin() as connection:
        connection.execute(one_more)
        order.append("second")
    thread.join()
    with store.read() as connection:
        assert connection.scalar(sa.select(deployments.c.tp)) == 3, "an update was lost"
    assert order == ["first", "second"]


def test_several_processes_can_migrate_at_once(tmp_path: Path) -> None:
    program = "import sys; from cluster.store import Store; Store(sys.argv[1]).migrate()"
    command = [sys.executable, "-c", program, f"sqlite:///{tmp_path}/shared.db"]
    started = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]


def test_a_schema_from_the_future_is_refused(store: Store) -> None:
    with store.begin() as connection:
        head = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StorageError, match="newer version"):
        store.migrate()
    with store.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = :head"), {"head": head})


@pytest.mark.parametrize("url", ["nonsense", "oracle+nothing://x", ""])
def test_a_url_that_can_not_be_used_is_a_clear_error(url: str) -> None:
    with pytest.raises(StorageError, match="database_url"):
        Store(url)


def test_a_directory_that_is_missing_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="can't be opened"):
        Store(f"sqlite:///{tmp_path}/missing/mmaas.db").migrate()


def test_the_password_is_not_printed() -> None:
    assert "geheim" not in str(Store("postgresql+psycopg://user:geheim@localhost/db"))


def test_deployments_from_before_there_were_stages_have_one(store: Store) -> None:
    store.downgrade("0001")
    with store.begin() as connection:
        columns, values = ", ".join(ROW), ", ".join(f":{name}" for name in ROW)
        connection.execute(sa.text(f"INSERT INTO deployments ({columns}) VALUES ({values})"), ROW)
    store.migrate()
    with store.read() as connection:
        assert connection.scalar(sa.select(deployments.c.pp)) == 1
