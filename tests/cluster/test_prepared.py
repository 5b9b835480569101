from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from cluster.prepared import Prepared
from cluster.store import Store

words = sa.Table(
    "words_of_a_test",
    sa.MetaData(),
    sa.Column("word", sa.String(20), primary_key=True),
    sa.Column("count", sa.BigInteger, nullable=False),
    sa.Column("share", sa.Float(53)),
)
INSERT = Prepared(words.insert())
COUNT = Prepared(words.update().where(words.c.word == sa.bindparam("b_word")).values(count=words.c.count + sa.bindparam("more")))
AMONG = Prepared(
    sa.select(words.c.word, words.c.count, words.c.share)
    .where(words.c.word.in_(sa.bindparam("among", expanding=True)), words.c.count >= sa.bindparam("least"))
    .order_by(words.c.word),
    "among",
)


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    url = f"sqlite:///{tmp_path}/s.db" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    store = Store(url)
    words.metadata.create_all(store.engine)
    with store.begin() as connection:
        INSERT.run_each(connection, [{"word": word, "count": len(word), "share": 0.1} for word in ("a", "50%s", "it's ?")])
    yield store
    words.metadata.drop_all(store.engine)
    store.close()


def test_it_selects_what_the_statement_says_for_lists_of_any_length(store: Store) -> None:
    with store.read() as connection:
        assert AMONG.rows(connection, among=["a"], least=0) == [("a", 1, 0.1)]
        assert [row[0] for row in AMONG.rows(connection, among=["it's ?", "50%s", "x"], least=4)] == ["50%s", "it's ?"]
        assert AMONG.rows(connection, among=["b", "c"], least=0) == []


def test_it_runs_once_with_each_of_many_parameters(store: Store) -> None:
    with store.begin() as connection:
        COUNT.run_each(connection, [{"b_word": "a", "more": 10}, {"b_word": "50%s", "more": 20}])
    with store.read() as connection:
        assert [row[1] for row in AMONG.rows(connection, among=["a", "50%s", "it's ?"], least=0)] == [24, 11, 6]


def test_its_errors_are_those_of_sqlalchemy_and_end_the_transaction(store: Store) -> None:
    def twice() -> None:
        with store.begin() as connection:
            COUNT.run_each(connection, [{"b_word": "a", "more": 10}])
            INSERT.run_each(connection, [{"word": "a", "count": 1, "share": None}])

    with pytest.raises(sa.exc.IntegrityError):
        twice()
    with store.read() as connection:
        assert AMONG.rows(connection, among=["a"], least=0) == [("a", 1, 0.1)]


def test_a_lost_server_is_an_operational_error_and_the_next_connection_is_new(store: Store) -> None:
    if store.is_sqlite:
        pytest.skip("a file has no server")

    def cut_off() -> None:
        with store.read() as connection:
            own = connection.scalar(sa.text("SELECT pg_backend_pid()"))
            with store.begin() as other:
                other.execute(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": own})
            AMONG.rows(connection, among=["a"], least=0)

    with pytest.raises(sa.exc.OperationalError):
        cut_off()
    with store.read() as connection:
        assert AMONG.rows(connection, among=["a"], least=0) == [("a", 1, 0.1)]
