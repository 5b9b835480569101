"""A gateway's shares of limits that several gateways keep together.

Each draws small leases from the pools (`pools.py`) before it needs them and spends them from memory. A call waits for the database
only when its gateway sees a bucket for the first time, or spends it faster than it draws; all such calls wait for one transaction.
So that no window ever holds more than the limit, up to a quarter of each burst is kept out of the pool, and all gateways together
hold no more than that part unspent. What nobody wants here goes back within a second. A pool that has nothing is not asked again
before it may have: refusals cost no transaction.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from cluster.errors import PlatformError, Unavailable
from cluster.tenancy import gcra
from cluster.tenancy.counts import Kind, Level, Want
from cluster.tenancy.gcra import Rate
from cluster.tenancy.pools import SLOT_S, Answer, Ask, Pools

logger = logging.getLogger(__name__)

TICK_S = 0.25
IDLE_S = 1.0
DRY_S = 0.5
"""Longest time that an empty pool is not asked: other gateways may give something back."""
PATIENCE_S = 1.0
"""Longest wait of a call for the database."""
TRIES = 3
SPARE_STREAMS = 2


@dataclass(slots=True)
class Share:
    """What this gateway may spend of one bucket. `units` are free here; streams that run hold `running` more slots."""

    kind: Kind
    name: str
    limit: int
    units: int = 0
    running: int = 0
    waiting: list[int] = field(default_factory=list)  # what each waiting call wants
    used_at: float = 0.0
    renewed_at: float = 0.0
    recent: int = 0  # spent in this second, and in the one before
    before: int = 0
    second: int = 0
    dry_until: float = 0.0
    dry_units: int = 0  # that the pool did not have
    free_at: float = 0.0
    room: int = 0  # of the pool, when it was last seen
    reset_us: int = 0

    def is_dry(self, units: int, now: float) -> bool:
        return now < self.dry_until and units >= self.dry_units

    def count(self, units: int, now: float) -> None:
        if int(now) != self.second:
            self.before = self.recent if int(now) == self.second + 1 else 0
            self.recent, self.second = 0, int(now)
        self.recent += units
        self.used_at = now

    def target(self, most: int, now: float) -> int:
        """Free units worth holding: what a second takes, nothing after a pause."""
        if now - self.used_at > IDLE_S:
            return 0
        if self.kind == "streams":
            return min(most, SPARE_STREAMS)
        return min(most, max(self.recent, self.before))


class Shares:
    """`Counts` over pools. `gateways`: how many there may be."""

    def __init__(self, pools: Pools, gateways: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._pools, self._gateways, self._clock = pools, gateways, clock
        self._holder = secrets.token_hex(8)
        self._shares: dict[str, Share] = {}
        self._one_at_a_time = asyncio.Lock()
        self._coming: asyncio.Task[None] | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="limits")

    def burst(self, kind: Kind, limit: int) -> int:
        """The pool's. What is kept out of it is for what gateways hold."""
        return limit if kind == "streams" else limit - self._gateways * self._most(limit)

    async def prepare(self, wants: Sequence[Want]) -> None:
        """Draw what is missing. Raises Unavailable when the database doesn't answer in time."""
        if self._ticking is None:
            self._ticking = asyncio.ensure_future(self._tick())
        for _ in range(TRIES):
            short = [want for want in wants if self._is_missing(want)]
            if not short:
                break
            await self._wait(short)
        if self._coming is None and any(self._is_low(self._share(want)) for want in wants):
            self._round()

    def wait_us(self, want: Want) -> int:
        share, now = self._share(want), self._clock()
        if share.units >= want.units:
            return 0
        if want.units > self.burst(want.kind, want.limit):
            return gcra.NEVER_US
        return max(1000, round((share.free_at - now) * 1e6))

    def spend(self, want: Want) -> None:
        share = self._share(want)
        share.units -= want.units
        share.running += want.units if want.kind == "streams" else 0
        share.count(want.units, self._clock())

    def give(self, want: Want, units: int) -> None:
        share = self._share(want)
        share.units += units
        share.running -= units if want.kind == "streams" else 0

    def level(self, want: Want) -> Level:
        share = self._share(want)
        return Level(max(0, share.units + share.room), share.reset_us)

    async def renew(self) -> None:
        """Top up, give back and say that this gateway lives, as far as there is need. Raises Unavailable."""
        if any(self._needs(share) for share in self._shares.values()):
            await self._round()

    async def aclose(self) -> None:
        """Give everything back and stop. Nothing may be asked afterwards."""
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)
        for share in self._shares.values():
            share.used_at = -IDLE_S - 1
        await self._draw(list(self._shares.values()))
        self._threads.shutdown()

    def _share(self, want: Want) -> Share:
        share = self._shares.get(want.name)
        if share is None:
            share = self._shares[want.name] = Share(want.kind, want.name, want.limit, used_at=self._clock())
        share.limit = want.limit
        return share

    def _most(self, limit: int) -> int:
        """Free units that each gateway may hold."""
        return limit // 4 // self._gateways

    def _is_missing(self, want: Want) -> bool:
        share = self._share(want)
        return (
            share.units < want.units
            and want.units <= self.burst(want.kind, want.limit)
            and not share.is_dry(want.units, self._clock())
        )

    def _is_low(self, share: Share) -> bool:
        now = self._clock()
        return 2 * share.units < share.target(self._most(share.limit), now) and not share.is_dry(1, now)

    async def _wait(self, short: list[Want]) -> None:
        shares = [(self._share(want), want.units) for want in short]
        for share, units in shares:
            share.waiting.append(units)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.shield(self._round())
        except TimeoutError:
            raise _unavailable() from None
        finally:
            for share, units in shares:
                share.waiting.remove(units)

    def _round(self) -> asyncio.Task[None]:
        """The next transaction. Who asks while one runs waits for the one after it."""
        if self._coming is None:
            self._coming = asyncio.ensure_future(self._run())
            self._coming.add_done_callback(_seen)
        return self._coming

    async def _run(self) -> None:
        async with self._one_at_a_time:
            self._coming = None
            await self._draw([share for share in self._shares.values() if self._needs(share)])

    def _needs(self, share: Share) -> bool:
        now = self._clock()
        surplus = share.units - share.target(self._most(share.limit), now)
        is_renewed = share.kind != "streams" or now - share.renewed_at < SLOT_S / 4 or not (share.units + share.running)
        return bool(share.waiting) or share.units < 0 or surplus > 0 or self._is_low(share) or not is_renewed

    async def _draw(self, shares: list[Share]) -> None:
        """One transaction for these shares. Raises Unavailable; then nothing has changed."""
        if not shares:
            return
        asks = [self._ask(share) for share in shares]
        for share, ask in zip(shares, asks, strict=True):
            share.units -= ask.back  # what goes back can't be spent meanwhile
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._threads, self._pools.draw, self._holder, asks)
        except Exception as error:
            for share, ask in zip(shares, asks, strict=True):
                share.units += ask.back
            if isinstance(error, PlatformError):
                raise
            logger.warning("limits can't be shared", extra={"reason": str(error)})
            raise _unavailable() from error
        for share, ask, answer in zip(shares, asks, answers, strict=True):
            self._take(share, ask, answer)

    def _ask(self, share: Share) -> Ask:
        now = self._clock()
        target = share.target(self._most(share.limit), now)
        waiting = sum(share.waiting)
        back = min(share.units, max(0, share.units - target - waiting)) if share.units >= 0 else share.units
        kept = share.units - back
        rate = Rate(share.limit, self.burst(share.kind, share.limit))
        most = max(0, target + waiting - kept)
        least = max(0, min(share.waiting) - kept) if share.waiting else min(1, most)
        return Ask(share.kind, share.name, rate, least, most, back, kept + share.running if share.kind == "streams" else 0)

    def _take(self, share: Share, ask: Ask, answer: Answer) -> None:
        now = self._clock()
        share.units += answer.granted
        share.room, share.reset_us, share.renewed_at = answer.room, answer.reset_us, now
        if answer.wait_us:
            share.free_at = now + answer.wait_us / 1e6
            share.dry_until, share.dry_units = min(share.free_at, now + DRY_S), ask.least
        else:
            share.dry_until = 0.0

    async def _tick(self) -> None:
        """Renew and forget, beside the calls."""
        while True:
            await asyncio.sleep(TICK_S)
            await asyncio.gather(self.renew(), return_exceptions=True)
            now = self._clock()
            gone = [s for s in self._shares.values() if not (s.units or s.running or s.waiting) and now - s.used_at > 10 * IDLE_S]
            for share in gone:
                del self._shares[share.name]


def _seen(coming: asyncio.Task[None]) -> None:
    """A failure was logged where it happened, and raised to whoever waits."""
    if not coming.cancelled():
        coming.exception()


def _unavailable() -> Unavailable:
    return Unavailable("The limits of this project can't be checked now.", retry_after_s=1.0, code="limits_unavailable")
