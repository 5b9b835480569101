"""The ledger: prices, budgets and balances, postings and entries, usage, credits, invoices. Facts refuse to be changed."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

METERS = (
    "requests",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "replayed_tokens",
    "compute_seconds",
    "traded_volume",
)
APPEND_ONLY = ("postings", "entries", "usage_records", "price_versions", "plan_changes", "grants", "invoices")


def _columns(kind: Any, *names: str) -> list[sa.Column[Any]]:
    return [sa.Column(name, kind, nullable=False) for name in names]


def upgrade() -> None:
    _prices()
    _budgets()
    _journal()
    _work()
    _bills()
    postgres = op.get_bind().dialect.name == "postgresql"
    if postgres:
        op.execute(
            "CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$"
        )
    for table in APPEND_ONLY:
        _keep(table, postgres)


def _keep(table: str, postgres: bool) -> None:
    """Let the database itself refuse changes."""
    if postgres:
        events = "UPDATE OR DELETE OR TRUNCATE"
        op.execute(f"CREATE TRIGGER {table}_kept BEFORE {events} ON {table} FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()")
        return
    for verb in ("update", "delete"):
        refuse = f"SELECT RAISE(ABORT, '{table} is append-only')"
        op.execute(f"CREATE TRIGGER {table}_kept_{verb} BEFORE {verb} ON {table} BEGIN {refuse}; END")


def _prices() -> None:
    op.create_table(
        "price_versions",
        sa.Column("id", sa.Integer, nullable=False),
        *_columns(sa.String(63), "plan"),
        *_columns(sa.Float(53), "effective_at", "created_at"),
        *_columns(sa.Text(), "body"),
        sa.PrimaryKeyConstraint("id", name="pk_price_versions"),
    )
    op.create_index("ix_price_versions_plan", "price_versions", ["plan"])
    op.create_table(
        "plan_changes",
        sa.Column("id", sa.Integer, nullable=False),
        *_columns(sa.String(63), "organization", "plan"),
        *_columns(sa.Float(53), "effective_at"),
        sa.PrimaryKeyConstraint("id", name="pk_plan_changes"),
    )
    op.create_index("ix_plan_changes_organization", "plan_changes", ["organization"])


def _budgets() -> None:
    op.create_table(
        "budgets",
        *_columns(sa.String(80), "scope"),
        *_columns(sa.String(8), "period"),
        *_columns(sa.BigInteger(), "micro"),
        sa.PrimaryKeyConstraint("scope", "period", name="pk_budgets"),
    )
    op.create_table(
        "balances",
        *_columns(sa.String(80), "scope"),
        *_columns(sa.BigInteger(), "held"),
        *_columns(sa.Integer(), "day"),
        *_columns(sa.BigInteger(), "spent_day"),
        *_columns(sa.Integer(), "month"),
        *_columns(sa.BigInteger(), "spent_month", "spent", "seq"),
        *_columns(sa.Float(53), "booked_at"),
        sa.PrimaryKeyConstraint("scope", name="pk_balances"),
    )


def _journal() -> None:
    op.create_table(
        "postings",
        *_columns(sa.String(63), "organization"),
        *_columns(sa.BigInteger(), "seq"),
        *_columns(sa.String(100), "subject"),
        *_columns(sa.String(12), "kind"),
        *_columns(sa.String(63), "project"),
        *_columns(sa.Integer(), "day"),
        *_columns(sa.Float(53), "booked_at"),
        sa.PrimaryKeyConstraint("organization", "seq", name="pk_postings"),
        sa.UniqueConstraint("subject", "kind", name="uq_postings_subject_kind"),
    )
    op.create_index("ix_postings_organization_day", "postings", ["organization", "day"])
    op.create_table(
        "entries",
        *_columns(sa.String(63), "organization"),
        *_columns(sa.BigInteger(), "seq"),
        *_columns(sa.Integer(), "line"),
        *_columns(sa.String(110), "account"),
        *_columns(sa.BigInteger(), "amount"),
        sa.Column("model", sa.String(130)),
        sa.Column("meter", sa.String(20)),
        sa.Column("quantity", sa.BigInteger),
        sa.Column("price", sa.Integer),
        sa.PrimaryKeyConstraint("organization", "seq", "line", name="pk_entries"),
        sa.ForeignKeyConstraint(["organization", "seq"], ["postings.organization", "postings.seq"], name="fk_entries_posting"),
    )
    op.create_index("ix_entries_account", "entries", ["account"])
    op.create_table(
        "usage_records",
        *_columns(sa.String(100), "request_id"),
        *_columns(sa.String(63), "organization"),
        *_columns(sa.BigInteger(), "seq"),
        *_columns(sa.String(63), "project", "key_id"),
        *_columns(sa.String(130), "model"),
        *_columns(sa.Integer(), "price"),
        *_columns(sa.String(16), "outcome"),
        *_columns(sa.Float(53), "opened_at", "booked_at"),
        *_columns(sa.BigInteger(), "amount", *METERS),
        sa.PrimaryKeyConstraint("request_id", name="pk_usage_records"),
    )
    op.create_index("ix_usage_records_organization_booked_at", "usage_records", ["organization", "booked_at"])


def _work() -> None:
    op.create_table(
        "holds",
        *_columns(sa.String(100), "request_id"),
        *_columns(sa.String(63), "organization", "project", "key_id"),
        *_columns(sa.String(130), "model"),
        *_columns(sa.Integer(), "price"),
        *_columns(sa.BigInteger(), "worst"),
        *_columns(sa.Float(53), "opened_at"),
        *_columns(sa.String(32), "owner"),
        *_columns(sa.BigInteger(), *METERS),
        sa.PrimaryKeyConstraint("request_id", name="pk_holds"),
    )
    op.create_index("ix_holds_owner", "holds", ["owner"])
    op.create_table(
        "ledger_owners",
        *_columns(sa.String(32), "owner"),
        *_columns(sa.BigInteger(), "beat"),
        sa.PrimaryKeyConstraint("owner", name="pk_ledger_owners"),
    )
    op.create_table(
        "counters",
        *_columns(sa.String(63), "organization"),
        *_columns(sa.String(200), "charge"),
        *_columns(sa.Integer(), "label"),
        *_columns(sa.BigInteger(), "quantity"),
        sa.PrimaryKeyConstraint("organization", "charge", "label", name="pk_counters"),
    )


def _bills() -> None:
    op.create_table(
        "grants",
        *_columns(sa.String(40), "id"),
        *_columns(sa.String(63), "organization"),
        *_columns(sa.BigInteger(), "amount"),
        *_columns(sa.String(200), "reason"),
        *_columns(sa.Float(53), "granted_at"),
        sa.Column("expires_at", sa.Float(53)),
        sa.PrimaryKeyConstraint("id", name="pk_grants"),
    )
    op.create_index("ix_grants_organization", "grants", ["organization"])
    op.create_table(
        "invoices",
        *_columns(sa.String(100), "id"),
        *_columns(sa.String(63), "organization"),
        *_columns(sa.Integer(), "month"),
        *_columns(sa.Float(53), "issued_at"),
        *_columns(sa.BigInteger(), "total"),
        *_columns(sa.Text(), "body"),
        sa.PrimaryKeyConstraint("id", name="pk_invoices"),
        sa.UniqueConstraint("organization", "month", name="uq_invoices_organization_month"),
    )


def downgrade() -> None:
    tables = ("invoices", "grants", "counters", "ledger_owners", "holds", "usage_records", "entries", "postings")
    for table in (*tables, "balances", "budgets", "plan_changes", "price_versions"):
        op.drop_table(table)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION refuse_change()")
