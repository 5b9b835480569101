"""The audit log with its head and checkpoints, answers by idempotency key, and consents to keep inputs and outputs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

APPEND_ONLY = "audit_log is append-only"


def upgrade() -> None:
    op.create_table(
        "audit_log",
        sa.Column("number", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("organization", sa.String(63), nullable=False),
        sa.Column("project", sa.String(63)),
        sa.Column("actor_kind", sa.String(16), nullable=False),
        sa.Column("actor_id", sa.String(128), nullable=False),
        sa.Column("actor_email", sa.String(256)),
        sa.Column("actor_address", sa.String(64)),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("target", sa.String(256)),
        sa.Column("before", sa.Text),
        sa.Column("after", sa.Text),
        sa.Column("request_id", sa.String(64)),
        sa.Column("previous", sa.LargeBinary(32), nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_audit_log"),
        sa.UniqueConstraint("id", name="uq_audit_log_id"),
    )
    op.create_index("ix_audit_log_at", "audit_log", ["at"])
    _refuse_changes()
    head = op.create_table("audit_head", sa.Column("id", sa.Integer, primary_key=True, autoincrement=False), *_head_columns())
    op.create_table("audit_checkpoints", *_head_columns(), sa.PrimaryKeyConstraint("number", name="pk_audit_checkpoints"))
    op.bulk_insert(head, [{"id": 1, "number": 0, "digest": bytes(32), "at": 0.0, "signature": b""}])
    _idempotency()
    op.create_table(
        "consents",
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("share", sa.Float(53), nullable=False),
        sa.Column("keep_s", sa.Float(53), nullable=False),
        sa.Column("redaction", sa.String(63)),
        sa.Column("changed_at", sa.Float(53), nullable=False),
        sa.PrimaryKeyConstraint("tenant", name="pk_consents"),
    )


def _head_columns() -> list[sa.Column[object]]:
    return [
        sa.Column("number", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("signature", sa.LargeBinary(64), nullable=False),
    ]


def _refuse_changes() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            refuse = f"BEGIN SELECT RAISE(ABORT, '{APPEND_ONLY}'); END"
            op.execute(f"CREATE TRIGGER audit_log_no_{verb.lower()} BEFORE {verb} ON audit_log {refuse}")
        return
    body = f"BEGIN RAISE EXCEPTION '{APPEND_ONLY}'; END"
    op.execute(f"CREATE FUNCTION audit_log_refuse() RETURNS trigger LANGUAGE plpgsql AS $${body}$$")
    refuse = "EXECUTE FUNCTION audit_log_refuse()"
    op.execute(f"CREATE TRIGGER audit_log_append_only BEFORE UPDATE OR DELETE ON audit_log FOR EACH ROW {refuse}")
    op.execute(f"CREATE TRIGGER audit_log_no_truncate BEFORE TRUNCATE ON audit_log FOR EACH STATEMENT {refuse}")


def _idempotency() -> None:
    op.create_table(
        "idempotency",
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("key", sa.LargeBinary(32), nullable=False),
        sa.Column("request", sa.LargeBinary(32), nullable=False),
        sa.Column("run", sa.String(32)),
        sa.Column("lease_until", sa.Float(53), nullable=False),
        sa.Column("expires_at", sa.Float(53), nullable=False),
        sa.Column("status", sa.Integer),
        sa.Column("headers", sa.Text),
        sa.Column("body", sa.LargeBinary),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "key", name="pk_idempotency"),
    )
    op.create_index("ix_idempotency_expires_at", "idempotency", ["expires_at"])
    op.create_index("ix_idempotency_tenant_expires_at", "idempotency", ["tenant", "expires_at"])
    op.create_table(
        "idempotency_totals",
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("rows", sa.BigInteger, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant", name="pk_idempotency_totals"),
    )


def downgrade() -> None:
    for table in ("consents", "idempotency_totals", "idempotency", "audit_checkpoints", "audit_head", "audit_log"):
        op.drop_table(table)
    if op.get_bind().dialect.name != "sqlite":
        op.execute("DROP FUNCTION audit_log_refuse()")
