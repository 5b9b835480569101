"""What is configured for a project, as a gateway knows it: at most a second old, or ten while it can't be read."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.tenancy.model_permissions import EVERYTHING, ModelPermissions, Permission
from cluster.tenancy.rate_limits import ANY, RateLimit, RateLimits

logger = logging.getLogger(__name__)

STALE_S = 0.9
"""Age at which rules are read again. Calls wait for it: a project that was quiet for long must not go on with what once was."""

PATIENCE_S = 0.5
"""How long they wait before they go on with the old ones."""

OLD_S = 10.0
"""Older rules are no rules: a call waits for newer ones, as the first did."""

CAPACITY = 10_000


@dataclass(frozen=True, slots=True)
class Rules:
    limits: tuple[RateLimit, ...] = ()
    permission: Permission = EVERYTHING

    def covering(self, model: str, key_id: str) -> list[RateLimit]:
        return [limit for limit in self.limits if limit.covers(model, key_id)]


Read = Callable[[str], Rules]
"""The rules of a project. May block."""


def stored(limits: RateLimits, permissions: ModelPermissions, default: RateLimit) -> Read:
    """Rules from the store. `default` bounds every project as a whole that has no row of its own for that."""

    def read(project: str) -> Rules:
        rows = limits.of(project)
        if not default.bounds_nothing and not any(row.model == ANY and row.key_id == ANY for row in rows):
            rows = (*rows, replace(default, project=project))
        return Rules(rows, permissions.of(project) or EVERYTHING)

    return read


@dataclass(slots=True)
class _Known:
    asked: float
    rules: Rules


class KnownRules:
    """Reads in threads; calls of one project share a reading."""

    def __init__(self, read: Read, clock: Callable[[], float] = time.monotonic) -> None:
        self._read, self._clock = read, clock
        self._known: dict[str, _Known] = {}
        self._reading: dict[str, asyncio.Task[Rules]] = {}

    async def of(self, project: str) -> Rules:
        """Raises what the reading raised when nothing recent is known."""
        known = self._known.get(project)
        age = self._clock() - known.asked if known else OLD_S
        if known and age < STALE_S:
            return known.rules
        reading = self._start(project)
        if known and age < OLD_S:
            await asyncio.wait({reading}, timeout=PATIENCE_S)
            return known.rules if not reading.done() or reading.cancelled() or reading.exception() else reading.result()
        return await asyncio.shield(reading)

    def _start(self, project: str) -> asyncio.Task[Rules]:
        if project not in self._reading:
            self._reading[project] = reading = asyncio.ensure_future(self._renew(project))
            reading.add_done_callback(_seen)
        return self._reading[project]

    async def _renew(self, project: str) -> Rules:
        asked = self._clock()
        try:
            rules = await asyncio.to_thread(self._read, project)
        finally:
            del self._reading[project]
        self._known.pop(project, None)
        self._known[project] = _Known(asked, rules)
        if len(self._known) > CAPACITY:
            del self._known[next(iter(self._known))]  # the one read longest ago
        return rules


def _seen(reading: asyncio.Task[Rules]) -> None:
    if not reading.cancelled() and (error := reading.exception()):
        logger.warning("limits can't be read", extra={"reason": str(error)})
