"""Who is calling: a bearer key becomes a Principal through the injected `verify`, at most one second stale.

Knows nothing about how keys are stored. `verify` may block (it reads SQL), so it runs in a small pool of threads; calls with the
same key at the same time share one look-up. Only successes are remembered, under a digest: no key text is kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from cluster.errors import Unauthenticated
from cluster.types import Principal

Verify = Callable[[str], Principal]
"""Raises Unauthenticated for a key that is unknown, revoked or expired."""

STALE_S = 0.9
"""Age at which an answer of `verify` is asked again, counted from before the look-up: a revoked key dies within a second."""

MAX_KEY = 256
"""Longest key that is looked up."""


class Keys:
    def __init__(self, verify: Verify, *, clock: Callable[[], float] = time.monotonic, capacity: int = 4096) -> None:
        self._verify = verify
        self._clock = clock
        self._capacity = capacity
        self._known: dict[bytes, tuple[float, Principal]] = {}
        self._asking: dict[bytes, asyncio.Future[Principal]] = {}
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="keys")

    async def principal(self, key: str) -> Principal:
        """Raises Unauthenticated."""
        if not (0 < len(key) <= MAX_KEY and key.isascii() and key.isprintable()):
            raise Unauthenticated("Incorrect API key provided.")
        digest = hashlib.sha256(key.encode()).digest()
        asked, principal = self._known.get(digest, (-STALE_S, None))
        if principal is not None and self._clock() - asked < STALE_S:
            return principal
        asking = self._asking.get(digest)
        if asking is None:
            asking = self._asking[digest] = asyncio.ensure_future(self._ask(digest, key))
            asking.add_done_callback(_seen)
        return await asyncio.shield(asking)  # one caller that leaves must not fail the others

    async def _ask(self, digest: bytes, key: str) -> Principal:
        asked = self._clock()
        try:
            principal = await asyncio.get_running_loop().run_in_executor(self._threads, self._verify, key)
            self._known.pop(digest, None)
            self._known[digest] = asked, principal
            if len(self._known) > self._capacity:
                del self._known[next(iter(self._known))]  # the one asked longest ago
            return principal
        except Unauthenticated:
            self._known.pop(digest, None)
            raise
        finally:
            del self._asking[digest]


def _seen(asked: asyncio.Future[Principal]) -> None:
    """Every caller may have left before a refusal came: that is no news for the log."""
    if not asked.cancelled():
        asked.exception()


def bearer(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The key of exactly one `Authorization: Bearer KEY` header. Raises Unauthenticated."""
    values = [value for name, value in headers if name == b"authorization"]
    if not values:
        raise Unauthenticated("You didn't provide an API key: send the header Authorization: Bearer YOUR_KEY.")
    scheme, _, key = values[0].partition(b" ")
    if len(values) > 1 or scheme.lower() != b"bearer" or len(key) > MAX_KEY:
        raise Unauthenticated("The Authorization header must be one: Authorization: Bearer YOUR_KEY.")
    return key.strip().decode("latin-1")


def check_place(headers: Iterable[tuple[bytes, bytes]], principal: Principal) -> None:
    """Organization and project come from the key alone. Raises Unauthenticated where a header says another one: a caller who sends
    it would be surprised by whose calls they become."""
    own = {b"openai-organization": principal.organization, b"openai-project": principal.tenant}
    for name, value in headers:
        place = own.get(name)
        if place and value and value != place.encode():
            raise Unauthenticated(f"This key is not of the one that the header {name.decode()} names.", code="mismatched_place")
