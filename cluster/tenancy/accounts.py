"""All of tenancy's nouns over one store, for who administers: the gateway and the command line."""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.store import Store
from cluster.tenancy import access, usage_report
from cluster.tenancy.budgets import Budgets
from cluster.tenancy.groups import Groups
from cluster.tenancy.invites import Invites
from cluster.tenancy.invoice_files import InvoiceFiles
from cluster.tenancy.invoices import Invoices
from cluster.tenancy.keys import Keys
from cluster.tenancy.model_permissions import ModelPermissions
from cluster.tenancy.prices import Prices
from cluster.tenancy.projects import Projects
from cluster.tenancy.rate_limits import RateLimits
from cluster.tenancy.roles import Kind, Roles
from cluster.tenancy.service_accounts import ServiceAccounts
from cluster.tenancy.spend_alerts import SpendAlerts
from cluster.tenancy.usage_report import Cost, Question, Sum
from cluster.tenancy.users import Users


class Accounts:
    def __init__(self, store: Store, pepper: bytes, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self.clock = clock
        self.projects = Projects(store, clock)
        self.service_accounts = ServiceAccounts(store, clock)
        self.users = Users(store, clock)
        self.groups = Groups(store, clock)
        self.roles = Roles(store, clock)
        self.invites = Invites(store, clock)
        self.keys = Keys(store, pepper, clock)
        self.rate_limits = RateLimits(store)
        self.model_permissions = ModelPermissions(store)
        self.prices = Prices(store, clock)
        self.budgets = Budgets(store)
        self.spend_alerts = SpendAlerts(store, clock)
        self.invoices = Invoices(store, clock)
        self.invoice_files = InvoiceFiles(store)

    def permissions(self, organization: str, kind: Kind, holder: str) -> frozenset[str]:
        """What a user may do in the organization, or what a group gives to its users. Raises NotFound for the group."""
        if kind == "group":
            self.groups.get(organization, holder)
            return frozenset().union(*(role.permissions for role in self.roles.assigned(organization, None, kind, holder)))
        with self._store.read() as connection:
            return access.in_organization(connection, organization, holder)

    def usage(self, asked: Question) -> list[Sum]:
        """Raises InvalidRequest."""
        return usage_report.usage(self._store, asked)

    def costs(self, asked: Question) -> list[Cost]:
        """Raises InvalidRequest."""
        return usage_report.costs(self._store, asked)
