"""Limits of projects, the models they may use, and what gateways share of the limits."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "rate_limits",
        sa.Column("project", sa.String(63), nullable=False),
        sa.Column("model", sa.String(127), nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("requests", sa.BigInteger),
        sa.Column("tokens", sa.BigInteger),
        sa.Column("streams", sa.Integer),
        sa.PrimaryKeyConstraint("project", "model", "key_id", name="pk_rate_limits"),
    )
    op.create_table(
        "model_permissions",
        sa.Column("project", sa.String(63), nullable=False),
        sa.Column("mode", sa.String(16), nullable=False),
        sa.Column("models", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("project", name="pk_model_permissions"),
    )
    op.create_table(
        "rate_pools",
        sa.Column("name", sa.String(300), nullable=False),
        sa.Column("debt", sa.BigInteger, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_rate_pools"),
    )
    op.create_table(
        "stream_leases",
        sa.Column("name", sa.String(300), nullable=False),
        sa.Column("holder", sa.String(32), nullable=False),
        sa.Column("held", sa.Integer, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("name", "holder", name="pk_stream_leases"),
    )


def downgrade() -> None:
    for table in ("stream_leases", "rate_pools", "model_permissions", "rate_limits"):
        op.drop_table(table)
