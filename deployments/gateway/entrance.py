"""The parts that HTTP and handles share, put together once in a process."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.settings import GatewaySettings
from deployments.gateway.accounts import Accounts
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
    accounts: Accounts = field(default_factory=Accounts)

    @classmethod
    def of(
        cls,
        models: Models,
        verify: Verify,
        settings: GatewaySettings,
        keepalive_s: float = KEEPALIVE_S,
        accounts: Accounts | None = None,
    ) -> Entrance:
        return cls(models, Keys(verify), Gate(settings.max_ongoing), settings, keepalive_s, accounts or Accounts())
