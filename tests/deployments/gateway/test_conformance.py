"""Every route of ours that the OpenAI API has, by the official client with strict validation, held against the published document.

The list of routes is that of the application, the client's methods are found by what they call, and bodies are made from our own
document. So a new route is driven without an edit here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import httpx
import jsonschema
import openai
import pytest

from tests import published
from tests.deployments.gateway.official import methods
from tests.deployments.gateway.routes_page import page
from tests.deployments.gateway.whole import OPERATIONS, REFERENCES, Operation, Tenant, Whole, whole
from tests.published import Route, shape

METHODS = methods(("admin", "models", "chat", "completions", "embeddings"))
OURS: dict[Route, Operation] = {(one.method, shape(one.path)): one for one in OPERATIONS}
SHARED = {route: one for route, one in OURS.items() if route in published.ROUTES}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    with whole(tmp_path_factory.mktemp("conformance")) as gateway:
        yield gateway


def drive(tenant: Tenant, route: Route, operation: Operation) -> httpx.Response:
    """By the client's own method. Raises what strict validation finds, and returns what was said on the wire."""
    said: list[httpx.Response] = []

    def keep(answer: httpx.Response) -> None:
        answer.read()
        said.append(answer)

    http = httpx.Client(event_hooks={"response": [keep]}, timeout=30)
    client = openai.OpenAI(
        api_key=tenant.project_key,
        admin_api_key=tenant.owner_key,
        base_url=f"{tenant.server.url}/v1",
        max_retries=0,
        http_client=http,
        _strict_response_validation=True,
    )
    method = METHODS[route]
    with client:
        call = method.of(client)
        ids = {name: tenant.ids[kind] for name, kind in zip(method.arguments, operation.kinds, strict=True)}
        given = tenant.query(operation) | (tenant.body(operation) or {})
        known = inspect.signature(call).parameters
        beyond = {name: value for name, value in given.items() if name not in known}
        call(**ids, **{name: value for name, value in given.items() if name in known}, extra_body=beyond or None)
    return said[-1]


def make_room(tenant: Tenant, operation: Operation) -> None:
    """Who is in a group or project already leaves it, so that they can be put in again."""
    if operation.method == "POST" and operation.parameters and REFERENCES.keys() & (tenant.body(operation) or {}).keys():
        for other in OPERATIONS:
            if other.method == "DELETE" and shape(other.path) == shape(operation.path) + "/{}":
                tenant.ask(other)


def test_enough_is_shared_with_the_published_document() -> None:
    assert len(SHARED) > 80
    assert sorted(SHARED.keys() - METHODS.keys()) == [], "the official client has no method for a published route of ours"


@pytest.mark.parametrize("route", SHARED, ids=" ".join)
def test_the_official_client_gets_a_published_answer(gateway: Whole, route: Route) -> None:
    operation = SHARED[route]
    tenant = gateway.tenant_for(operation)
    make_room(tenant, operation)
    answer = drive(tenant, route, operation)
    assert answer.status_code == 200
    published.check_route(route, answer.json())


def test_an_answer_that_is_not_published_is_found() -> None:
    with pytest.raises(jsonschema.ValidationError):
        published.check_route(("GET", "/v1/organization/projects/{}"), {"id": "p", "object": "organization.project"})


def test_the_page_of_routes_is_true() -> None:
    assert (Path(__file__).parents[3] / "docs" / "openai-routes.md").read_text() == page()
