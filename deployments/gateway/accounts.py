"""What the gateway knows about tenants beyond their keys, put together once in a process. A part that isn't there isn't used: a
gateway over other parts than the platform's store, as in tests, has none."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cluster.tenancy.audit import Audit
from cluster.tenancy.chain import Actor
from cluster.tenancy.denials import Denials
from cluster.tenancy.keeper import Keeper
from deployments.gateway.exchange import Exchange
from deployments.gateway.once import Once

if TYPE_CHECKING:
    from cluster.settings import Settings
    from cluster.store import Store
    from deployments.gateway.chores import Chore


@dataclass(frozen=True)
class Accounts:
    audit: Audit | None = None
    denials: Denials | None = None
    once: Once | None = None
    keeper: Keeper | None = None
    chores: tuple[Chore, ...] = ()

    async def record(self, notes: Exchange, action: str, target: str) -> None:
        """Write down an act of the caller that lies outside of the store, after it was done."""
        principal = notes.principal
        if self.audit is not None and principal is not None:
            append = partial(
                self.audit.record,
                *(Actor("api_key", principal.key_id), action, target),
                organization=principal.organization,
                project=principal.tenant,
                request_id=notes.request_id,
            )
            await asyncio.to_thread(append)

    @classmethod
    def of(cls, store: Store, settings: Settings) -> Accounts:
        from cluster.private_files import Secrets
        from cluster.tenancy.audit import keep_head
        from cluster.tenancy.consents import Consents
        from cluster.tenancy.idempotency import Bounds, Idempotency
        from cluster.tenancy.kept_files import KeptFiles
        from cluster.tenancy.redaction import REDACTIONS
        from deployments.gateway.chores import Chore

        gateway = settings.gateway
        audit = Audit(store, Secrets(settings.home).audit_key)
        denials = Denials(audit)
        keys = Idempotency(store, Bounds(gateway.idempotency_answer_bytes, gateway.idempotency_tenant_bytes))
        consents = Consents(store, audit, frozenset(REDACTIONS))
        files = KeptFiles(settings.home / "kept")
        keeper = Keeper(files, consents.list, REDACTIONS, queue_bytes=gateway.kept_queue_bytes)
        chores = (
            Chore("denials", 1.0, denials.write, partial(denials.write, everything=True)),
            Chore("consents", 1.0, keeper.refresh),
            Chore("kept calls", 10.0, keeper.write),
            Chore("audit head", 60.0, lambda: keep_head(audit, settings.home / "audit" / "head.json")),
            Chore("idempotency keys", 60.0, keys.purge),
            Chore("old kept calls", 3600.0, keeper.expire),
        )
        return cls(audit, denials, Once(keys, gateway.max_ongoing), keeper, chores)
