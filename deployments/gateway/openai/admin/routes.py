"""Every route of the administration API, to be put into an application."""

from __future__ import annotations

from starlette.routing import BaseRoute

from deployments.gateway.openai.admin import (
    admin_keys,
    audit,
    billing,
    groups,
    project_limits,
    projects,
    roles,
    spend_alerts,
    spend_limits,
    usage,
    users,
)

_PEOPLE = (projects, project_limits, admin_keys, users, groups, roles, audit)
_MONEY = (usage, spend_limits, spend_alerts, billing)

routes: list[BaseRoute] = [route for part in (*_PEOPLE, *_MONEY) for route in part.router.routes]
