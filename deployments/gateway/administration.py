"""What administrators change through the gateway. Blocks; routes call it in threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa

from cluster.store import Store, api_keys
from cluster.tenancy.model_permissions import ModelPermissions
from cluster.tenancy.rate_limits import RateLimits


@dataclass(frozen=True)
class Administration:
    rates: RateLimits
    permissions: ModelPermissions
    has_project: Callable[[str], bool]


def has_keys(store: Store) -> Callable[[str], bool]:
    """A project is there once it has a key."""

    def has_project(project: str) -> bool:
        with store.read() as connection:
            return connection.scalar(sa.select(api_keys.c.id).where(api_keys.c.tenant == project).limit(1)) is not None

    return has_project
