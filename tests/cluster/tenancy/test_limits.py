from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from cluster.errors import ModelNotFound, RateLimited
from cluster.tenancy import rules as rules_module
from cluster.tenancy.counts import Meters
from cluster.tenancy.limits import CountedLimits, Granted, Unlimited, duration
from cluster.tenancy.model_permissions import Permission
from cluster.tenancy.rate_limits import RateLimit
from cluster.tenancy.rules import KnownRules, Rules
from cluster.types import Principal

ACME = Principal("acme", "key1", frozenset({"inference"}))
OTHER_KEY = Principal("acme", "key2", frozenset({"inference"}))
RIVAL = Principal("rival", "key3", frozenset({"inference"}))


class Time:
    def __init__(self) -> None:
        self.us = 0

    def pass_s(self, seconds: float) -> None:
        self.us += round(seconds * 1e6)


@pytest.fixture
def time() -> Time:
    return Time()


def limits_of(time: Time, *rows: RateLimit, permission: Permission | None = None) -> CountedLimits:
    def read(project: str) -> Rules:
        return Rules(tuple(row for row in rows if row.project == project), permission or Permission())

    return CountedLimits(KnownRules(read), Meters(lambda: time.us))


def admit(limits: CountedLimits, who: Principal = ACME, model: str = "chat", tokens: int = 1, **options: bool) -> Granted:
    return asyncio.run(limits.admit(who, model, tokens, **options))


def refused(limits: CountedLimits, who: Principal = ACME, model: str = "chat", tokens: int = 1, **options: bool) -> RateLimited:
    with pytest.raises(RateLimited) as refusal:
        admit(limits, who, model, tokens, **options)
    return refusal.value


def test_without_rows_nothing_is_limited_or_said(time: Time) -> None:
    assert admit(limits_of(time)).headers == {}
    assert asyncio.run(Unlimited().admit(ACME, "chat", 10**12)).headers == {}


def test_requests_of_a_minute_then_one_when_it_was_said(time: Time) -> None:
    limits = limits_of(time, RateLimit("acme", requests=3))
    for _ in range(3):
        admit(limits).settle(1)
    error = refused(limits)
    assert (error.status, error.public_code) == (429, "rate_limit_exceeded")
    assert error.retry_after_s == 20
    assert "requests per minute: limit 3" in error.message
    time.pass_s(20)
    admit(limits)
    refused(limits)


def test_tokens_are_taken_at_the_worst_case_and_corrected(time: Time) -> None:
    limits = limits_of(time, RateLimit("acme", tokens=1000))
    first = admit(limits, tokens=800)
    assert refused(limits, tokens=800).retry_after_s == pytest.approx(36)
    first.settle(100)
    first.settle(0)  # only the first counts
    assert admit(limits, tokens=800).headers["x-ratelimit-remaining-tokens"] == "100"


def test_what_was_used_beyond_is_owed(time: Time) -> None:
    limits = limits_of(time, RateLimit("acme", tokens=1000))
    admit(limits, tokens=5000).settle(2500)
    assert refused(limits, tokens=100).retry_after_s == pytest.approx(96)
    time.pass_s(96)
    admit(limits, tokens=100)


def test_a_wait_of_hours_is_said_as_the_longest_that_clients_obey(time: Time) -> None:
    limits = limits_of(time, RateLimit("acme", tokens=10))
    admit(limits, tokens=10).settle(10_000)
    assert refused(limits).retry_after_s == 120


def test_a_refused_call_takes_nothing_of_the_limits_that_it_fits(time: Time) -> None:
    limits = limits_of(time, RateLimit("acme", requests=10), RateLimit("acme", "chat", tokens=5))
    admit(limits, tokens=5)
    for _ in range(20):
        refused(limits, tokens=5)
    assert admit(limits, model="other").headers["x-ratelimit-remaining-requests"] == "8"


def test_project_model_and_key_are_limited_each_for_itself(time: Time) -> None:
    rows = [RateLimit("acme", requests=4), RateLimit("acme", "chat", requests=2), RateLimit("acme", "chat", "key1", requests=1)]
    limits = limits_of(time, *rows)
    admit(limits, ACME)
    assert "key key1" in refused(limits, ACME).message
    admit(limits, OTHER_KEY)
    assert "model chat" in refused(limits, OTHER_KEY).message
    admit(limits, OTHER_KEY, "small")
    admit(limits, ACME, "small")
    assert "model" not in refused(limits, ACME, "small").message


def test_adapters_count_as_their_base(time: Time) -> None:
    limits = limits_of(time, RateLimit("acme", "chat", requests=1))
    admit(limits, model="chat:legal")
    refused(limits, model="chat")
    refused(limits, model="chat:other")


def test_nobody_feels_another_project(time: Time) -> None:
    limits = limits_of(time, RateLimit("acme", requests=1), RateLimit("rival", requests=1))
    admit(limits)
    refused(limits)
    admit(limits, RIVAL)


def test_streams_are_counted_while_they_run(time: Time) -> None:
    limits = limits_of(time, RateLimit("acme", streams=2))
    first, _ = admit(limits, streams=True), admit(limits, streams=True)
    assert refused(limits, streams=True).retry_after_s == 1
    admit(limits)  # an answer in one piece is no stream
    first.settle(5)
    admit(limits, streams=True)
    refused(limits, streams=True)


def test_a_limit_of_nothing_lets_nobody_in(time: Time) -> None:
    assert refused(limits_of(time, RateLimit("acme", requests=0))).retry_after_s == 120
    refused(limits_of(time, RateLimit("acme", tokens=0)))


def test_headers_are_those_of_the_tightest_limit(time: Time) -> None:
    limits = limits_of(time, RateLimit("acme", requests=100, tokens=50_000), RateLimit("acme", "chat", requests=60))
    assert admit(limits, tokens=5000).headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "50000",
        "x-ratelimit-remaining-tokens": "45000",
        "x-ratelimit-reset-tokens": "6s",
    }


def test_a_refusal_says_what_is_left_too(time: Time) -> None:
    limits = limits_of(time, RateLimit("acme", requests=1))
    admit(limits)
    assert refused(limits).headers["x-ratelimit-remaining-requests"] == "0"


@pytest.mark.parametrize(
    ("mode", "listed", "good", "bad"),
    [
        ("allow_list", ("chat",), ["chat", "chat:legal"], ["small", "small:chat"]),
        ("deny_list", ("chat",), ["small"], ["chat", "chat:legal"]),
        ("allow_list", ("chat:legal",), ["chat:legal"], ["chat", "chat:other"]),
        ("allow_list", (), [], ["chat"]),
    ],
)
def test_models_that_a_project_may_not_use_do_not_exist_for_it(
    time: Time, mode: str, listed: tuple[str, ...], good: list[str], bad: list[str]
) -> None:
    limits = limits_of(time, permission=Permission(mode, listed))  # type: ignore[arg-type]
    for model in good:
        admit(limits, model=model)
    for model in bad:
        with pytest.raises(ModelNotFound):
            admit(limits, model=model)


@pytest.mark.parametrize(
    ("us", "text"),
    [(0, "0ms"), (1, "1ms"), (6000, "6ms"), (1_000_000, "1s"), (1_500_000, "1.5s"), (120_000_000, "2m0s"), (90_500_000, "1m30.5s")],
)
def test_times_read_as_those_of_the_official_api(us: int, text: str) -> None:
    assert duration(us) == text


def test_rules_hold_a_second_after_they_changed_and_survive_a_short_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules_module, "PATIENCE_S", 0.05)
    now, failing, rows = [0.0], [False], [RateLimit("acme", requests=1)]
    reads, goes_on = 0, threading.Event()
    goes_on.set()

    def read(project: str) -> Rules:
        nonlocal reads
        reads += 1
        goes_on.wait(10)
        if failing[0]:
            raise OSError("the database is away")
        return Rules(tuple(rows))

    async def walk() -> None:
        known = KnownRules(read, lambda: now[0])
        many = await asyncio.gather(*(known.of("acme") for _ in range(50)))
        assert reads == 1
        assert all(rules.limits == tuple(rows) for rules in many)
        rows[0] = RateLimit("acme", requests=2)
        now[0] = 8.0
        assert (await known.of("acme")).limits[0].requests == 2
        rows[0], now[0] = RateLimit("acme", requests=3), 9.0
        goes_on.clear()
        assert (await known.of("acme")).limits[0].requests == 2, "a database that is slow keeps nobody"
        goes_on.set()
        await until(lambda: reads == 3 and not known._reading)
        assert (await known.of("acme")).limits[0].requests == 3
        failing[0], now[0] = True, 11.0
        assert (await known.of("acme")).limits[0].requests == 3
        assert reads == 4
        now[0] = 30.0
        with pytest.raises(OSError, match="away"):
            await known.of("acme")

    asyncio.run(walk())


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(2000):
        await asyncio.sleep(0.005)
        if holds():
            return
    raise AssertionError("it did not happen in time")
