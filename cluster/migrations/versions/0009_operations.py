"""What was asked for, beside every reservation and every usage record. Those from before were all of one kind to the ledger."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

TABLES = ("holds", "usage_records")


def upgrade() -> None:
    for table in TABLES:
        op.add_column(table, sa.Column("operation", sa.String(16), nullable=False, server_default="completions"))


def downgrade() -> None:
    for table in TABLES:
        op.drop_column(table, "operation")
