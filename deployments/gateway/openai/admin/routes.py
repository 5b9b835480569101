"""Every route of the administration API, to be put into an application."""

from __future__ import annotations

from starlette.routing import BaseRoute

from deployments.gateway.openai.admin import admin_keys, audit, groups, project_limits, projects, roles, users

routes: list[BaseRoute] = [
    route for part in (projects, project_limits, admin_keys, users, groups, roles, audit) for route in part.router.routes
]
