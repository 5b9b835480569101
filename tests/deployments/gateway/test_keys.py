from __future__ import annotations

import asyncio
import threading

import pytest

from cluster.errors import Unauthenticated
from cluster.types import Principal
from deployments.gateway.keys import STALE_S, Keys, bearer, check_place
from tests.fakes import KeyRing


async def test_a_key_is_asked_once_while_fresh_and_again_when_stale() -> None:
    ring, now = KeyRing(), [0.0]
    keys = Keys(ring.verify, clock=lambda: now[0])
    for _ in range(3):
        assert (await keys.principal(ring.USER)).tenant == "acme"
    assert ring.lookups == 1
    now[0] = STALE_S
    await keys.principal(ring.USER)
    assert ring.lookups == 2


async def test_a_revoked_key_dies_within_a_second() -> None:
    ring, now = KeyRing(), [0.0]
    keys = Keys(ring.verify, clock=lambda: now[0])
    await keys.principal(ring.USER)
    del ring.principals[ring.USER]
    now[0] = 0.5
    await keys.principal(ring.USER)
    now[0] = 0.99
    with pytest.raises(Unauthenticated):
        await keys.principal(ring.USER)


async def test_refusals_are_not_remembered() -> None:
    ring = KeyRing()
    keys = Keys(ring.verify)
    for expected in (1, 2):
        with pytest.raises(Unauthenticated):
            await keys.principal("mk_late")
        assert ring.lookups == expected
    ring.principals["mk_late"] = Principal("late", "k", frozenset())
    assert (await keys.principal("mk_late")).tenant == "late"


async def test_calls_at_the_same_time_share_one_look_up_and_do_not_block_the_loop() -> None:
    ring, go = KeyRing(), threading.Event()

    def slow(text: str) -> Principal:
        assert go.wait(5)
        return ring.verify(text)

    keys = Keys(slow)
    calls = [asyncio.create_task(keys.principal(ring.USER)) for _ in range(20)]
    await asyncio.sleep(0.05)  # the loop turns while the look-up blocks
    calls[0].cancel()
    go.set()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert {answer.tenant for answer in answers[1:]} == {"acme"}
    assert ring.lookups == 1


async def test_the_memory_is_bounded() -> None:
    keys = Keys(lambda text: Principal(text, text, frozenset()), capacity=10)
    for number in range(50):
        await keys.principal(f"mk_{number}")
    assert len(keys._known) == 10


async def test_texts_that_can_be_no_key_are_never_looked_up() -> None:
    ring = KeyRing()
    for text in ("", "a b\n", "ü", "x" * 300):
        with pytest.raises(Unauthenticated):
            await Keys(ring.verify).principal(text)
    assert ring.lookups == 0


def test_bearer_takes_one_header_of_one_kind() -> None:
    assert bearer([(b"authorization", b"bearer abc ")]) == "abc"
    for headers in ([], [(b"authorization", b"Basic abc")], [(b"authorization", b"Bearer a"), (b"authorization", b"Bearer b")]):
        with pytest.raises(Unauthenticated):
            bearer(headers)


def test_headers_that_name_another_organization_or_project_are_refused() -> None:
    caller = Principal("proj_a", "k", frozenset(), "org_a")
    check_place([(b"openai-project", b"proj_a"), (b"openai-organization", b"org_a"), (b"x", b"y")], caller)
    check_place([(b"openai-project", b"")], caller)
    for header in ((b"openai-project", b"proj_b"), (b"openai-organization", b"\xff")):
        with pytest.raises(Unauthenticated):
            check_place([header], caller)
