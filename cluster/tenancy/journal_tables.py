"""The ledger's tables.

Postings, entries and usage records are append-only, and the database itself refuses to change or delete them. Holds and counters
are working state, derived from these and checked against them by `cluster/tenancy/reconcile.py`.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Float, ForeignKeyConstraint, Integer, String, Table, UniqueConstraint

from cluster.store import metadata
from cluster.tenancy.metered import METERS, Metered

APPEND_ONLY = ("postings", "entries", "usage_records", "price_versions", "plan_changes", "grants", "invoices")
"""Tables whose rows a trigger keeps as they are."""


def _meters() -> list[Column[int]]:
    return [Column(name, BigInteger, nullable=False) for name in METERS]


postings = Table(
    "postings",
    metadata,
    Column("organization", String(63), primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("subject", String(100), nullable=False),  # a request, a grant or an invoice
    Column("kind", String(12), nullable=False),
    Column("project", String(63), nullable=False),
    Column("day", Integer, nullable=False),  # of booked_at, for sums by day
    Column("booked_at", Float(53), nullable=False),  # seconds since the epoch, here and below
    UniqueConstraint("subject", "kind", name="uq_postings_subject_kind"),
    sa.Index("ix_postings_organization_day", "organization", "day"),
)

entries = Table(
    "entries",
    metadata,
    Column("organization", String(63), primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("line", Integer, primary_key=True, autoincrement=False),
    Column("account", String(110), nullable=False, index=True),
    Column("amount", BigInteger, nullable=False),  # micro-units: a debit is positive
    Column("model", String(130)),
    Column("meter", String(20)),
    Column("quantity", BigInteger),
    Column("price", Integer),
    ForeignKeyConstraint(["organization", "seq"], ["postings.organization", "postings.seq"], name="fk_entries_posting"),
)

holds = Table(
    "holds",
    metadata,
    Column("request_id", String(100), primary_key=True),
    Column("organization", String(63), nullable=False),
    Column("project", String(63), nullable=False),
    Column("key_id", String(63), nullable=False),
    Column("model", String(130), nullable=False),
    Column("price", Integer, nullable=False),  # version
    Column("worst", BigInteger, nullable=False),
    Column("opened_at", Float(53), nullable=False),
    Column("owner", String(32), nullable=False, index=True),
    *_meters(),
    Column("operation", String(16), nullable=False, server_default="completions"),
)

owners = Table(
    "ledger_owners",
    metadata,
    Column("owner", String(32), primary_key=True),
    Column("beat", BigInteger, nullable=False),  # grows as long as it lives; no clock is compared with another's
)

usage_records = Table(
    "usage_records",
    metadata,
    Column("request_id", String(100), primary_key=True),
    Column("organization", String(63), nullable=False),
    Column("seq", BigInteger, nullable=False),  # of its posting
    Column("project", String(63), nullable=False),
    Column("key_id", String(63), nullable=False),
    Column("model", String(130), nullable=False),
    Column("price", Integer, nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("opened_at", Float(53), nullable=False),
    Column("booked_at", Float(53), nullable=False),
    Column("amount", BigInteger, nullable=False),
    *_meters(),
    Column("operation", String(16), nullable=False, server_default="completions"),
    sa.Index("ix_usage_records_organization_booked_at", "organization", "booked_at"),
)

counters = Table(
    "counters",
    metadata,
    Column("organization", String(63), primary_key=True),
    Column("charge", String(200), primary_key=True),
    Column("label", Integer, primary_key=True, autoincrement=False),  # of its window: a day or a month
    Column("quantity", BigInteger, nullable=False),
)


def metered_of(row: Any) -> Metered:
    return Metered(**{name: getattr(row, name) for name in METERS})
