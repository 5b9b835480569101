"""The parts that HTTP and handles share, put together once in a process."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.settings import GatewaySettings
from cluster.tenancy.accounts import Accounts
from cluster.types import Adapter, Deployment, Principal
from deployments.gateway.guards import Gate
from deployments.gateway.keys import Keys, Verify
from deployments.router import Models

KEEPALIVE_S = 15.0
"""Silence on a stream before a comment is sent; also how long an answer without a first token stays free to fail plainly."""


@dataclass(frozen=True)
class Entrance:
    models: Models
    keys: Keys
    gate: Gate
    settings: GatewaySettings
    keepalive_s: float = KEEPALIVE_S
    accounts: Accounts | None = None

    @classmethod
    def of(
        cls,
        models: Models,
        verify: Verify,
        settings: GatewaySettings,
        keepalive_s: float = KEEPALIVE_S,
        accounts: Accounts | None = None,
    ) -> Entrance:
        return cls(models, Keys(verify), Gate(settings.max_ongoing), settings, keepalive_s, accounts)

    async def offers(self, principal: Principal | None) -> tuple[list[Deployment], list[Adapter]]:
        """What is served, as far as the caller's key may call it."""
        served, adapters = await self.models.list(), await self.models.adapters()
        if principal is None:
            return [], []
        may = principal.may_call
        return [one for one in served if may(one.name)], [one for one in adapters if may(one.model)]
