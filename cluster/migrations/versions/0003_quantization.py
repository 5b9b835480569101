"""How the weights of a served model are quantised."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("deployments", sa.Column("quantization", sa.String(16)))


def downgrade() -> None:
    op.drop_column("deployments", "quantization")
