"""What Alembic runs around the revisions: it uses the connection and the transaction that `Store` opened."""

from __future__ import annotations

from alembic import context

from cluster.store import metadata
from cluster.tenancy import audit, consents, idempotency  # noqa: F401 - their tables

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, compare_type=True)
context.run_migrations()
