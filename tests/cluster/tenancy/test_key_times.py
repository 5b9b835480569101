"""That time does not tell which keys exist: interleaved checks of hopeless keys, compared by the test of Kolmogorov and Smirnov."""

from __future__ import annotations

import bisect
import hmac
import math
import random
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cluster.errors import Unauthenticated
from cluster.store import Store
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.key_records import api_keys
from cluster.tenancy.key_text import parsed
from cluster.tenancy.keys import Keys
from cluster.tenancy.projects import DEFAULT
from cluster.types import Principal

SAMPLES = 600
TRIES = 5
"""Two equal distributions fail the bound of 0.01 once in a hundred times; that they fail it three times of five is no chance."""


def p_value(one: list[float], other: list[float]) -> float:
    """Of two samples of one distribution to be as far apart (Smirnov's series)."""
    one, other = sorted(one), sorted(other)
    points = (*one, *other)
    far = max(abs(bisect.bisect_right(one, x) / len(one) - bisect.bisect_right(other, x) / len(other)) for x in points)
    stretch = far * math.sqrt(len(one) * len(other) / (len(one) + len(other)))
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * stretch) ** 2) for k in range(1, 101))) if stretch > 0.3 else 1.0


def with_checksum(body: str) -> str:
    return f"{body}{zlib.crc32(body.encode()):08x}"


def tells_apart(verify: Callable[[str], object], one: list[str], other: list[str]) -> bool:
    """Whether the times of the two kinds differ, most times that it is looked at."""
    return statistics.median(p_value(*_times(verify, one, other)) for _ in range(TRIES)) < 0.01


def _times(verify: Callable[[str], object], one: list[str], other: list[str]) -> tuple[list[float], list[float]]:
    rng, taken = random.Random(1), ([], [])
    calls = [(kind, rng.choice((one, other)[kind])) for kind in (0, 1) for _ in range(SAMPLES)]
    rng.shuffle(calls)
    for kind, text in calls:
        before = time.perf_counter()
        with pytest.raises(Unauthenticated):
            verify(text)
        taken[kind].append(time.perf_counter() - before)
    return taken


@pytest.fixture
def accounts(tmp_path: Path) -> Iterator[Accounts]:
    """On SQLite alone: the way to Postgres varies more than what is looked for, and would hide it."""
    store = Store(f"sqlite:///{tmp_path}/mmaas.db")
    store.migrate()
    yield Accounts(store, b"pepper")
    store.close()


@pytest.fixture
def texts(accounts: Accounts) -> tuple[list[str], list[str]]:
    """Keys of ids that are there with wrong secrets, and of ids that aren't."""
    known = [accounts.keys.create(DEFAULT, "key")[0] for _ in range(20)]
    rng = random.Random(2)
    unknown = [rng.randbytes(6).hex() for _ in range(20)]
    return tuple([with_checksum(f"mk_{key_id}{rng.randbytes(32).hex()}") for key_id in ids] for ids in (known, unknown))  # type: ignore[return-value]


def test_unknown_ids_and_wrong_secrets_take_the_same_time(accounts: Accounts, texts: tuple[list[str], list[str]]) -> None:
    assert not tells_apart(accounts.keys.verify, *texts)


def test_a_secret_that_is_wrong_at_its_end_takes_as_long_as_one_wrong_at_its_start(accounts: Accounts) -> None:
    texts = [accounts.keys.create(DEFAULT, "key")[1] for _ in range(20)]
    ends = [with_checksum(f"{text[:-9]}{'1' if text[-9] == '0' else '0'}") for text in texts]
    starts = [with_checksum(f"{text[:15]}{'1' if text[15] == '0' else '0'}{text[16:-8]}") for text in texts]
    assert not tells_apart(accounts.keys.verify, starts, ends)


def test_a_check_that_stops_at_an_unknown_id_is_found(accounts: Accounts, texts: tuple[list[str], list[str]]) -> None:
    class Hasty(Keys):
        def verify(self, text: str) -> Principal:
            key_id, secret = parsed(text)
            with self._store.read() as connection:
                row: Any = connection.execute(sa.select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
            if row is None:
                raise Unauthenticated("the API key is not valid")
            if not hmac.compare_digest(self._digest(secret), row.digest):
                raise Unauthenticated("the API key is not valid")
            raise AssertionError("the secrets are wrong")

    store: Store = accounts.keys._store
    assert tells_apart(Hasty(store, b"pepper").verify, *texts)


def test_a_comparison_that_stops_at_the_first_difference_is_found() -> None:
    """The comparison alone: inside a check it would be lost among the database's microseconds."""
    right = b"0" * 2048
    one, other = ["1" + "0" * 2047], ["0" * 2047 + "1"]

    def checked(equal: Callable[[bytes, bytes], bool]) -> Callable[[str], None]:
        def verify(text: str) -> None:
            if not equal(text.encode(), right):
                raise Unauthenticated("wrong")

        return verify

    assert tells_apart(checked(lambda a, b: all(x == y for x, y in zip(a, b, strict=True))), one, other)
    assert not tells_apart(checked(hmac.compare_digest), one, other)
    assert "hmac.compare_digest(" in Path(Keys.verify.__code__.co_filename).read_text()
