"""What stands around every call, put together once in a process: whose it is, what it may, what becomes of it.

A part that isn't there isn't used: a gateway over other parts than the platform's store, as in tests, has none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.settings import GatewaySettings
from cluster.store import Store
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.counts import Meters
from cluster.tenancy.limits import CountedLimits, Limits, Unlimited
from cluster.tenancy.pools import StoredPools
from cluster.tenancy.rate_limits import RateLimit
from cluster.tenancy.rules import KnownRules, stored
from cluster.tenancy.shares import Shares


@dataclass(frozen=True)
class Tenancy:
    accounts: Accounts | None = None  # without them there is no administration over HTTP
    limits: Limits = field(default_factory=Unlimited)

    @classmethod
    def of(cls, store: Store, accounts: Accounts, settings: GatewaySettings) -> Tenancy:
        return cls(accounts, limits_of(store, accounts, settings))


NONE = Tenancy()


def limits_of(store: Store, accounts: Accounts, settings: GatewaySettings) -> Limits:
    """Counted in this process where the store is SQLite, which has one gateway, and through the store where there may be more."""
    default = RateLimit("", requests=settings.requests_per_minute, tokens=settings.tokens_per_minute, streams=settings.streams)
    rules = KnownRules(stored(accounts.rate_limits, accounts.model_permissions, default))
    return CountedLimits(rules, Meters() if store.is_sqlite else Shares(StoredPools(store), settings.replicas))
