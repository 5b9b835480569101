"""The parts that HTTP and handles share, put together once in a process."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.settings import GatewaySettings
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.limits import Limits
from deployments.gateway.cache import Cache
from deployments.gateway.guards import Gate
from deployments.gateway.keys import Keys, Verify
from deployments.gateway.tenancy import NONE, Tenancy
from deployments.models import Models

KEEPALIVE_S = 15.0
"""Silence on a stream before a comment is sent; also how long an answer without a first token stays free to fail plainly."""


@dataclass(frozen=True)
class Entrance:
    models: Models
    keys: Keys
    gate: Gate
    settings: GatewaySettings
    tenancy: Tenancy
    keepalive_s: float = KEEPALIVE_S
    cache: Cache | None = None

    @classmethod
    def of(
        cls,
        models: Models,
        verify: Verify,
        settings: GatewaySettings,
        tenancy: Tenancy = NONE,
        keepalive_s: float = KEEPALIVE_S,
    ) -> Entrance:
        gate, cache = Gate(settings.max_ongoing), Cache.of(models, settings)
        return cls(models, Keys(verify), gate, settings, tenancy, keepalive_s, cache)

    @property
    def accounts(self) -> Accounts | None:
        return self.tenancy.accounts

    @property
    def limits(self) -> Limits:
        return self.tenancy.limits
