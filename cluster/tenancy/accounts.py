"""All of tenancy's nouns over one store, for who administers: the gateway and the command line."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from sqlalchemy import Connection

from cluster.store import Store
from cluster.tenancy import access, usage_report
from cluster.tenancy.acts import Change, Note, unnoted
from cluster.tenancy.audit import Audit
from cluster.tenancy.budgets import Budgets
from cluster.tenancy.chain import Actor
from cluster.tenancy.consents import Consents
from cluster.tenancy.credits import Credits
from cluster.tenancy.groups import Groups
from cluster.tenancy.invites import Invites
from cluster.tenancy.invoice_files import InvoiceFiles
from cluster.tenancy.invoices import Invoices
from cluster.tenancy.key_records import email_of
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
    """With an audit log, they can be looked at until it is known who acts (`by`), and whoever changes something is recorded."""

    def __init__(
        self,
        store: Store,
        pepper: bytes,
        clock: Callable[[], float] = time.time,
        audit: Audit | None = None,
        note: Note | None = None,
    ) -> None:
        self._store = store
        self._pepper = pepper
        self._audit = audit
        self.clock = clock
        written = note or (nobody if audit else unnoted)
        self.projects = Projects(store, clock, written)
        self.service_accounts = ServiceAccounts(store, clock, written)
        self.users = Users(store, clock, written)
        self.groups = Groups(store, clock, written)
        self.roles = Roles(store, clock, written)
        self.invites = Invites(store, clock, written)
        self.keys = Keys(store, pepper, clock, written)
        self.rate_limits = RateLimits(store, written)
        self.model_permissions = ModelPermissions(store, written)
        self.consents = Consents(store, clock, written)
        self.prices = Prices(store, clock, written)
        self.budgets = Budgets(store, written)
        self.spend_alerts = SpendAlerts(store, clock, written)
        self.credits = Credits(store, clock, written)
        self.invoices = Invoices(store, clock, written)
        self.invoice_files = InvoiceFiles(store)

    def by(self, actor: Actor, request_id: str | None = None) -> Accounts:
        """The same, for one who acts."""
        note = partial(_written, self._audit, actor, request_id) if self._audit else None
        return Accounts(self._store, self._pepper, self.clock, self._audit, note)

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


def _written(audit: Audit, actor: Actor, request_id: str | None, connection: Connection, change: Change) -> None:
    """A user's key is recorded with the user's address."""
    email = email_of(connection, actor.id) if actor.kind == "api_key" else actor.email
    audit.by(replace(actor, email=email), request_id)(connection, change)


def nobody(connection: Connection, change: Change) -> None:
    """Raises RuntimeError: an act without an actor is a mistake of ours."""
    raise RuntimeError(f"{change.action}: say who acts, with Accounts.by")
