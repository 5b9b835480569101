"""What stands around every call, put together once in a process: whose it is, what it may, what is written down about it.

A part that isn't there isn't used: a gateway over other parts than the platform's store, as in tests, has none.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial

from cluster.private_files import Secrets
from cluster.settings import GatewaySettings, Settings
from cluster.store import Store
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.alert_mails import AlertMails, sender
from cluster.tenancy.audit import Audit, keep_head
from cluster.tenancy.chain import Actor
from cluster.tenancy.counts import Meters
from cluster.tenancy.denials import Denials
from cluster.tenancy.idempotency import Bounds, Idempotency
from cluster.tenancy.keeper import Keeper
from cluster.tenancy.kept_files import KeptFiles
from cluster.tenancy.ledger import Ledger
from cluster.tenancy.limits import CountedLimits, Limits, Unlimited
from cluster.tenancy.metering import Metering
from cluster.tenancy.pools import StoredPools
from cluster.tenancy.rate_limits import RateLimit
from cluster.tenancy.redaction import REDACTIONS
from cluster.tenancy.rules import KnownRules, stored
from cluster.tenancy.shares import Shares
from deployments.gateway.chores import Chore
from deployments.gateway.exchange import Exchange
from deployments.gateway.once import Once


@dataclass(frozen=True)
class Tenancy:
    accounts: Accounts | None = None  # without them there is no administration over HTTP
    limits: Limits = field(default_factory=Unlimited)
    audit: Audit | None = None
    denials: Denials | None = None
    once: Once | None = None
    keeper: Keeper | None = None
    metering: Metering | None = None
    chores: tuple[Chore, ...] = ()

    async def record(self, notes: Exchange, action: str, target: str) -> None:
        """Write down an act of the caller that lies outside of the store, after it was done."""
        principal = notes.principal
        if self.audit is not None and principal is not None:
            append = partial(
                self.audit.record,
                *(Actor("api_key", principal.key_id), action, target),
                organization=principal.organization,
                project=principal.tenant or None,
                request_id=notes.request_id,
            )
            await asyncio.to_thread(append)

    @classmethod
    def of(cls, store: Store, settings: Settings) -> Tenancy:
        """All of it, over the platform's store and home."""
        gateway, secrets = settings.gateway, Secrets(settings.home)
        audit = Audit(store, secrets.audit_key)
        accounts = Accounts(store, secrets.pepper, audit=audit)
        denials = Denials(audit)
        keys = Idempotency(store, Bounds(gateway.idempotency_answer_bytes, gateway.idempotency_tenant_bytes))
        keeper = Keeper(KeptFiles(settings.home / "kept"), accounts.consents.list, REDACTIONS, queue_bytes=gateway.kept_queue_bytes)
        chores: tuple[Chore, ...] = (
            Chore("denials", 1.0, denials.write, partial(denials.write, everything=True)),
            Chore("spend alerts", 5.0, accounts.spend_alerts.evaluate),
            Chore("consents", 1.0, keeper.refresh),
            Chore("kept calls", 10.0, keeper.write),
            Chore("audit head", 60.0, lambda: keep_head(audit, settings.home / "audit" / "head.json")),
            Chore("idempotency keys", 60.0, keys.purge),
            Chore("old kept calls", 3600.0, keeper.expire),
        )
        if settings.mail.host is not None:
            mails = AlertMails(store, sender(settings.mail))
            chores += (Chore("mails", 30.0, mails.deliver, at_end=_leave, line="mails"),)  # its server may keep us waiting
        ledger = Ledger(store)
        chores += (Chore("ledger", ledger.lease_s / 3, ledger.reap, line="ledger"),)  # late, we would count as dead
        return cls(
            accounts,
            limits_of(store, accounts, gateway),
            audit,
            denials,
            Once(keys, gateway.max_ongoing),
            keeper,
            Metering(ledger),
            chores,
        )


NONE = Tenancy()


def limits_of(store: Store, accounts: Accounts, settings: GatewaySettings) -> Limits:
    """Counted in this process where the store is SQLite, which has one gateway, and through the store where there may be more."""
    default = RateLimit("", requests=settings.requests_per_minute, tokens=settings.tokens_per_minute, streams=settings.streams)
    rules = KnownRules(stored(accounts.rate_limits, accounts.model_permissions, default))
    return CountedLimits(rules, Meters() if store.is_sqlite else Shares(StoredPools(store), settings.replicas))


def _leave() -> None:
    """For another time, or another gateway: it stands in the store."""
