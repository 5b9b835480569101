"""The platform's SQL store: tables, one engine, migrations.

SQLite in HOME by default, Postgres by URL; one schema, changed only by the revisions in `cluster/migrations/`. SQLite runs in
rollback-journal mode with `synchronous=EXTRA`: versions before 3.51.3 can corrupt a WAL file that several connections use, and
EXTRA keeps a committed transaction through a loss of power. The journal's file stays between transactions, as making and removing
it would be a quarter of a short one's time. The store knows rows, not what they mean.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Column, Connection, Float, Integer, MetaData, String, Table, event

from cluster.errors import StorageError

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

deployments = Table(
    "deployments",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("model", String(4096), nullable=False),
    Column("tp", Integer, nullable=False),
    Column("dtype", String(16), nullable=False),
    Column("min_replicas", Integer, nullable=False),
    Column("max_replicas", Integer, nullable=False),
    Column("max_model_len", Integer),
    Column("created_at", Float(53), nullable=False),
    Column("pp", Integer, nullable=False, server_default="1"),
    Column("quantization", String(16)),
)

adapters = Table(
    "adapters",
    metadata,
    Column("base", String(63), primary_key=True),  # a deployment's name; it need not be deployed now
    Column("name", String(63), primary_key=True),
    Column("address", String(64), nullable=False),  # of its files in the library
    Column("created_at", Float(53), nullable=False),
)

_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATION_LOCK = 0x6D6D616173  # "mmaas", for Postgres' advisory lock


class Store:
    """One engine over one database. Safe to share between threads; every process makes its own."""

    def __init__(self, url: str) -> None:
        """`url` is a SQLAlchemy URL, `sqlite:///FILE` or `postgresql+psycopg://…`. Opens nothing yet."""
        try:
            self.url = sa.make_url(url)
            self.engine = sa.create_engine(self.url, pool_pre_ping=not self.is_sqlite)
        except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ModuleNotFoundError) as error:
            raise StorageError(f"database_url can't be used: {error}; write sqlite:///FILE or postgresql+psycopg://…") from None
        if self.is_sqlite:
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A transaction that may write: committed at the end, rolled back on an exception."""
        with self.engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads: on SQLite it takes no lock that a writer waits for."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    def migrate(self, revision: str = "head") -> None:
        """Bring the schema up to `revision`; does nothing when it is there. Safe to call from several processes at once."""
        self._run_alembic("upgrade", revision)

    def downgrade(self, revision: str) -> None:
        """Take the schema back to `revision` (`base`: no tables). Loses what the newer schema held."""
        self._run_alembic("downgrade", revision)

    def _run_alembic(self, verb: str, revision: str) -> None:
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        try:
            self._create_file()
            with self.begin() as connection:
                if not self.is_sqlite:  # SQLite's BEGIN IMMEDIATE already lets one writer in at a time
                    connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
                config.attributes["connection"] = connection
                getattr(command, verb)(config, revision)
        except CommandError as error:
            raise StorageError(f"{self} has a schema that this version doesn't know ({error}); run the newer version") from None
        except (sa.exc.OperationalError, OSError) as error:
            raise StorageError(f"{self} can't be opened: {getattr(error, 'orig', error)}") from None

    def _create_file(self) -> None:
        """Make SQLite's file ourselves, so that its mode never depends on the umask; the journal takes the same mode."""
        if self.is_sqlite and self.url.database not in (None, "", ":memory:"):
            os.close(os.open(str(self.url.database), os.O_RDWR | os.O_CREAT, 0o600))

    def close(self) -> None:
        self.engine.dispose()

    def __str__(self) -> str:
        return f"the store {self.url.render_as_string(hide_password=True)}"


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # sqlite3 would begin by itself, and too late: `_begin_sqlite` says when and how
    pragmas = ("busy_timeout=10000", "foreign_keys=ON", "journal_mode=PERSIST", "journal_size_limit=1048576", "synchronous=EXTRA")
    for pragma in pragmas:
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes its lock at once: one that upgrades a read lock later fails with "database is locked" instead of waiting.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")
