"""How many stages a deployment's layers are cut into: one, for those that were there before."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("deployments", sa.Column("pp", sa.Integer, nullable=False, server_default="1"))


def downgrade() -> None:
    with op.batch_alter_table("deployments") as table:
        table.drop_column("pp")
