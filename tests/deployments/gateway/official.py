"""Every method of the official client by the route that it calls, found by calling each of them over a wire that goes nowhere."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import httpx
import openai
from openai._resource import SyncAPIResource

from tests.published import Route, shape

SKIPPED = frozenset({"parse", "stream"})
"""Conveniences over a route that another method calls."""


def resources(node: Any, way: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A client's groups of methods with the names that lead to them."""
    for name in dir(type(node)):
        attribute = inspect.getattr_static(type(node), name)
        if isinstance(attribute, (cached_property, property)) and not name.startswith(("_", "with_")):
            child = getattr(node, name)
            if isinstance(child, SyncAPIResource):
                yield (*way, name), child
                yield from resources(child, (*way, name))


def needed(method: Callable[..., Any]) -> list[str]:
    """The arguments that a method can't do without."""
    return [p.name for p in inspect.signature(method).parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]


@dataclass(frozen=True)
class Method:
    way: tuple[str, ...]  # the names that lead to it from a client
    arguments: tuple[str, ...]  # those that are put into the path, in its order

    def of(self, client: openai.OpenAI) -> Callable[..., Any]:
        found: Callable[..., Any] = reduce(getattr, self.way, client)  # type: ignore[arg-type]
        return found


def methods(families: tuple[str, ...]) -> dict[Route, Method]:
    """For resources whose way begins with one of `families`."""
    asked: list[tuple[str, str]] = []

    def nowhere(request: httpx.Request) -> httpx.Response:
        asked.append((request.method, request.url.path))
        return httpx.Response(418)

    wire = httpx.Client(transport=httpx.MockTransport(nowhere))
    client = openai.OpenAI(api_key="-", admin_api_key="-", base_url="http://nowhere/v1", max_retries=0, http_client=wire)
    found: dict[Route, Method] = {}
    for way, resource in resources(client):
        for name, method in inspect.getmembers(resource, inspect.ismethod):
            if way[0] in families and not name.startswith(("_", "with_")) and name not in SKIPPED:
                asked.clear()
                try:
                    method(**{argument: f"{{{argument}}}" for argument in needed(method)})
                except (openai.APIStatusError, TypeError):  # 418, or it wants more than it says
                    for verb, path in asked:
                        found[verb, shape(path)] = Method((*way, name), tuple(re.findall(r"\{(\w+)\}", path)))
    return found
