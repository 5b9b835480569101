"""Answers that are kept, by key, within bounds of bytes: for each tenant, and for all together.

A tenant over its own bound loses what it used longest ago; when all together are over theirs, the tenant with the most bytes does.
So whoever floods the cache drives out its own answers, and those of nobody who keeps less. Knows no answer, only bytes.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

OVERHEAD = 300
"""Bytes of memory that an entry takes beside its value, about."""


@dataclass(slots=True)
class _Tenant:
    entries: OrderedDict[bytes, tuple[float, bytes]]  # when it ends, and the value; the one used longest ago first
    size: int = 0


class Kept:
    def __init__(self, max_bytes: int, tenant_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max, self._tenant_max, self._seconds, self._clock = max_bytes, tenant_bytes, seconds, clock
        self._tenants: dict[str, _Tenant] = {}
        self.size = 0

    def size_of(self, tenant: str) -> int:
        return self._tenants[tenant].size if tenant in self._tenants else 0

    def get(self, tenant: str, key: bytes) -> bytes | None:
        ours = self._tenants.get(tenant)
        found = ours.entries.get(key) if ours else None
        if ours is None or found is None:
            return None
        if found[0] <= self._clock():
            self._drop(tenant, key)
            return None
        ours.entries.move_to_end(key)
        return found[1]

    def put(self, tenant: str, key: bytes, value: bytes) -> None:
        """Kept unless it alone is more than the tenant may have."""
        size = len(value) + OVERHEAD
        if size > min(self._tenant_max, self._max):
            return
        self._drop(tenant, key)
        ours = self._tenants.setdefault(tenant, _Tenant(OrderedDict()))
        ours.entries[key] = self._clock() + self._seconds, value
        ours.size += size
        self.size += size
        while ours.size > self._tenant_max:
            self._drop_oldest(tenant)
        while self.size > self._max:
            self._drop_oldest(max(self._tenants, key=lambda name: self._tenants[name].size))

    def _drop_oldest(self, tenant: str) -> None:
        self._drop(tenant, next(iter(self._tenants[tenant].entries)))

    def _drop(self, tenant: str, key: bytes) -> None:
        ours = self._tenants.get(tenant)
        if ours is None or (entry := ours.entries.pop(key, None)) is None:
            return
        size = len(entry[1]) + OVERHEAD
        ours.size -= size
        self.size -= size
        if not ours.entries:
            del self._tenants[tenant]
