"""What Alembic runs around the revisions: it uses the connection and the transaction that `Store` opened."""

from __future__ import annotations

from alembic import context

from cluster.store import metadata
from cluster.tenancy import (  # noqa: F401 - they declare their tables on `metadata`
    accounts,
    audit,
    consents,
    credits,
    idempotency,
    invoices,
    journal,
    pools,
)

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, compare_type=True)
context.run_migrations()
