"""Organizations, projects, users, groups, roles, service accounts, invitations; keys that belong to them.

There is an organization `default` with a project `default`. What was a tenant before becomes a project of that name in it, so that
tenants stay apart as they were. A key becomes the key of a service account of its own; one that could administer becomes an admin
key and calls models no more: those are two worlds now.

On the way back a key stays only where the older schema can bind it as tightly: those of users, those for some models only, and
those of an organization that may not operate the platform are gone.
"""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

ID = sa.String(63)
TIME = sa.Float(53)
PEOPLE = ("invites", "role_assignments", "project_groups", "group_users", "groups", "project_users", "users", "roles")
PLACES = ("service_accounts", "projects", "organizations")


def upgrade() -> None:
    old = _rows("id", "tenant", "name", "digest", "scopes", "created_at", "expires_at", "revoked_at")
    op.drop_index("ix_api_keys_tenant", table_name="api_keys")
    op.drop_table("api_keys")
    _create_places()
    _create_people()
    _create_keys()
    now = time.time()
    _fill("organizations", [{"id": "default", "name": "default", "created_at": now}])
    tenants = {"default": now}
    for key in old:
        tenants[key["tenant"]] = min(key["created_at"], tenants.get(key["tenant"], now))
    _fill("projects", [{"id": t, "organization_id": "default", "name": t, "created_at": since} for t, since in tenants.items()])
    programs = [key for key in old if "admin" not in key["scopes"].split()]
    _fill("service_accounts", [_account(key) for key in programs])
    _fill("api_keys", [_key(key) for key in old])


def downgrade() -> None:
    ended = {row["id"] for row in _rows("id", "archived_at", table="projects") if row["archived_at"] is not None}
    gone = {row["id"] for row in _rows("id", "deleted_at", table="service_accounts") if row["deleted_at"] is not None}
    columns = ("id", "project_id", "service_account_id", "user_id", "name", "digest", "scopes", "models")
    now, kept = time.time(), []
    for key in _rows(*columns, "created_at", "expires_at", "revoked_at"):
        scopes = [word for word in key["scopes"].split() if word in ("admin", "inference")]
        if not scopes or key["models"] is not None or key["user_id"] is not None:
            continue
        has_ended = key["project_id"] in ended or key["service_account_id"] in gone
        row = {name: key[name] for name in ("id", "name", "digest", "created_at", "expires_at", "revoked_at")}
        row |= {"tenant": key["project_id"] or "default", "scopes": " ".join(scopes)}
        kept.append(row | ({"revoked_at": key["revoked_at"] or now} if has_ended else {}))
    for table in ("api_keys", *PEOPLE, *PLACES):
        op.drop_table(table)
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(12), nullable=False),
        sa.Column("tenant", ID, nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("scopes", sa.String(200), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("expires_at", TIME),
        sa.Column("revoked_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
    )
    op.create_index("ix_api_keys_tenant", "api_keys", ["tenant"])
    _fill("api_keys", kept)


def _create_places() -> None:
    op.create_table(
        "organizations",
        sa.Column("id", ID, nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_organizations"),
    )
    op.create_table(
        "projects",
        sa.Column("id", ID, nullable=False),
        _refers("organization_id", "organizations", "fk_projects_organization"),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("archived_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_projects"),
    )
    _index_by_time("projects", "organization_id")
    op.create_table(
        "service_accounts",
        sa.Column("id", ID, nullable=False),
        _refers("project_id", "projects", "fk_service_accounts_project"),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("deleted_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_service_accounts"),
    )
    _index_by_time("service_accounts", "project_id")


def _create_people() -> None:
    op.create_table(
        "roles",
        sa.Column("id", ID, nullable=False),
        _refers("organization_id", "organizations", "fk_roles_organization"),
        _refers("project_id", "projects", "fk_roles_project", nullable=True),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("description", sa.String(1000)),
        sa.Column("permissions", sa.Text, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_roles"),
    )
    _index_by_time("roles", "organization_id")
    op.create_table(
        "role_assignments",
        sa.Column("project_id", ID, nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("holder_id", ID, nullable=False),
        sa.Column("role_id", ID, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("project_id", "kind", "holder_id", "role_id", name="pk_role_assignments"),
    )
    op.create_index("ix_role_assignments_holder_id", "role_assignments", ["holder_id"])
    op.create_table(
        "users",
        sa.Column("id", ID, nullable=False),
        _refers("organization_id", "organizations", "fk_users_organization"),
        sa.Column("email", sa.String(250), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("role_id", ID, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("deleted_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
    )
    _index_by_time("users", "organization_id")
    live = sa.text("deleted_at IS NULL")
    columns = ["organization_id", "email"]
    op.create_index("uq_users_organization_id_email", "users", columns, unique=True, sqlite_where=live, postgresql_where=live)
    _create_membership("project_users", ("project_id", "projects"), ("user_id", "users"), has_role=True)
    op.create_table(
        "groups",
        sa.Column("id", ID, nullable=False),
        _refers("organization_id", "organizations", "fk_groups_organization"),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_groups"),
    )
    _index_by_time("groups", "organization_id")
    _create_membership("group_users", ("group_id", "groups"), ("user_id", "users"), has_role=False)
    op.create_index("ix_group_users_user_id", "group_users", ["user_id"])
    _create_membership("project_groups", ("project_id", "projects"), ("group_id", "groups"), has_role=True)
    op.create_table(
        "invites",
        sa.Column("id", ID, nullable=False),
        _refers("organization_id", "organizations", "fk_invites_organization"),
        sa.Column("email", sa.String(250), nullable=False),
        sa.Column("role_id", ID, nullable=False),
        sa.Column("projects", sa.Text, nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.Column("accepted_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_invites"),
        sa.UniqueConstraint("digest", name="uq_invites_digest"),
    )
    _index_by_time("invites", "organization_id")


def _create_keys() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(12), nullable=False),
        _refers("organization_id", "organizations", "fk_api_keys_organization"),
        _refers("project_id", "projects", "fk_api_keys_project", nullable=True),
        _refers("service_account_id", "service_accounts", "fk_api_keys_service_account", nullable=True),
        _refers("user_id", "users", "fk_api_keys_user", nullable=True),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("models", sa.Text),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("expires_at", TIME),
        sa.Column("revoked_at", TIME),
        sa.Column("last_used_at", TIME),
        sa.Column("replaced_by", sa.String(12)),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
    )
    _index_by_time("api_keys", "organization_id")
    _index_by_time("api_keys", "project_id")


def _create_membership(table: str, place: tuple[str, str], member: tuple[str, str], *, has_role: bool) -> None:
    op.create_table(
        table,
        *(_refers(column, other, f"fk_{table}_{column.removesuffix('_id')}") for column, other in (place, member)),
        *([sa.Column("role_id", ID, nullable=False)] if has_role else []),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint(place[0], member[0], name=f"pk_{table}"),
    )


def _refers(column: str, table: str, name: str, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(column, ID, sa.ForeignKey(f"{table}.id", name=name), nullable=nullable)


def _index_by_time(table: str, column: str) -> None:
    op.create_index(f"ix_{table}_{column}_created_at", table, [column, "created_at"])


def _rows(*columns: str, table: str = "api_keys") -> list[dict[str, Any]]:
    names: list[sa.ColumnClause[Any]] = [sa.column(name) for name in columns]
    return [dict(row) for row in op.get_bind().execute(sa.select(*names).select_from(sa.table(table, *names))).mappings()]


def _fill(table: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        op.bulk_insert(sa.table(table, *[sa.column(name) for name in rows[0]]), rows)


def _account(key: dict[str, Any]) -> dict[str, Any]:
    project, name = key["tenant"], key["name"]
    return {"id": f"svc_acct_{key['id']}", "project_id": project, "name": name, "role": "member", "created_at": key["created_at"]}


def _key(key: dict[str, Any]) -> dict[str, Any]:
    is_admin = "admin" in key["scopes"].split()
    kept = {name: key[name] for name in ("id", "name", "digest", "created_at", "expires_at", "revoked_at")}
    owner = {"project_id": None if is_admin else key["tenant"], "service_account_id": None if is_admin else f"svc_acct_{key['id']}"}
    return {**kept, **owner, "organization_id": "default", "scopes": "admin" if is_admin else key["scopes"]}
