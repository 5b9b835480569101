"""Default deny: a route that doesn't declare its scope can't be registered.

`@requires("inference")` marks an endpoint; `ScopedRoute` refuses an unmarked one when it is added, which is at import, and checks
the caller's principal before the endpoint runs. `PUBLIC` is the only scope that needs no key.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cluster.errors import Forbidden, InvalidRequest, ModelNotFound, Unauthenticated
from cluster.tenancy import permissions
from cluster.types import Principal
from deployments.gateway import exchange, once

PUBLIC = "public"
SCOPES = permissions.ALL | {PUBLIC}
DOCUMENTATION = frozenset({"/openapi.json", "/docs"})
"""FastAPI's own routes: they describe the API and hold no data."""

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


def requires(scope: str, *, shows_secret: bool = False) -> Callable[[Endpoint], Endpoint]:
    """Declare the scope of an endpoint. `shows_secret`: its answer has what is shown once, and so is never stored."""
    if scope not in SCOPES:
        raise ValueError(f"{scope!r} is not a scope; known are {', '.join(sorted(SCOPES))}")

    def mark(endpoint: Endpoint) -> Endpoint:
        endpoint.__scope__ = scope  # type: ignore[attr-defined]
        endpoint.__shows_secret__ = shows_secret  # type: ignore[attr-defined]
        return endpoint

    return mark


def permit(principal: Principal | None, scope: str) -> None:
    """Raises Unauthenticated without a principal and Forbidden when it lacks the scope."""
    if scope == PUBLIC:
        return
    if principal is None:
        raise Unauthenticated("This call needs a key: Authorization: Bearer YOUR_KEY.")
    if not principal.can(scope):
        raise Forbidden(f"This key does not have the scope {scope!r}.")


def permit_model(principal: Principal | None, model: str) -> None:
    """Raises ModelNotFound for a model that the caller's key is not for, whether it exists or not."""
    if principal is not None and not principal.may_call(model):
        raise ModelNotFound(f"The model {model[:256]!r} does not exist, or this key is not for it.", param="model")


class ScopedRoute(APIRoute):
    """A route that knows who may call it."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        scope = getattr(endpoint, "__scope__", None)
        if scope is None:
            raise TypeError(f"route {path} declares no scope: put @requires(...) under its decorator")
        self.scope: str = scope
        self.shows_secret = bool(getattr(endpoint, "__shows_secret__", False))
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = self.endpoint if self._is_plain() else super().get_route_handler()

        async def permitted(request: Request) -> Response:
            permit(exchange.of(request.scope).principal, self.scope)
            key = None if self.scope == PUBLIC else once.key_of(request)
            if key is None:
                return await handle(request)
            return await _once(request).answer(key, request, handle, is_stored=not self.shows_secret)

        return permitted

    def _is_plain(self) -> bool:
        """From the request to a response: there is nothing for FastAPI to read, provide or put into words, so it need not look."""
        found = inspect.signature(self.endpoint, eval_str=True)
        takes = list(found.parameters) == [self.dependant.request_param_name] and not self.dependant.dependencies
        gives = inspect.isclass(found.return_annotation) and issubclass(found.return_annotation, Response)
        return takes and gives and inspect.iscoroutinefunction(self.endpoint)


def _once(request: Request) -> once.Once:
    found: once.Once | None = request.app.state.entrance.tenancy.once
    if found is None:
        raise InvalidRequest("This gateway does not take an Idempotency-Key.", param="Idempotency-Key")
    return found


def public_paths(routes: Iterable[BaseRoute]) -> frozenset[str]:
    """The exact paths that need no key. Raises TypeError for a route that isn't under this module's control."""
    public = set(DOCUMENTATION)
    for route in routes:
        if isinstance(route, ScopedRoute):
            if route.scope == PUBLIC:
                public.add(route.path)
        elif not (isinstance(route, Route) and route.path in DOCUMENTATION):
            raise TypeError(f"{route!r} is not a ScopedRoute, so nobody says who may call it")
    return frozenset(public)
