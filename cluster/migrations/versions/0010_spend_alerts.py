"""Spend alerts, and those that were passed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.create_table(
        "spend_alerts",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("organization", sa.String(63), nullable=False),
        sa.Column("scope", sa.String(80), nullable=False),
        sa.Column("period", sa.String(8), nullable=False),
        sa.Column("threshold", sa.BigInteger, nullable=False),
        sa.Column("recipients", sa.Text, nullable=False),
        sa.Column("subject_prefix", sa.String(200)),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("changed_at", sa.Float(53), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_spend_alerts"),
    )
    op.create_index("ix_spend_alerts_scope", "spend_alerts", ["scope"])
    op.create_table(
        "passed_alerts",
        sa.Column("alert_id", sa.String(40), nullable=False),
        sa.Column("label", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("threshold", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("spent", sa.BigInteger, nullable=False),
        sa.Column("passed_at", sa.Float(53), nullable=False),
        sa.Column("mailed_at", sa.Float(53)),
        sa.PrimaryKeyConstraint("alert_id", "label", "threshold", name="pk_passed_alerts"),
    )


def downgrade() -> None:
    op.drop_table("passed_alerts")
    op.drop_table("spend_alerts")
