"""Our OpenAPI document against the running gateway, by schemathesis: right and wrong requests for every operation.

No answer is a fault of ours, none has a status, a type or a form that the document doesn't name. Two planted bugs are found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from cluster.errors import Conflict
from cluster.settings import GatewaySettings
from deployments.gateway.app import build_app
from tests.deployments.gateway.conftest import Server, serving
from tests.fakes import EchoModels, KeyRing

CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def application(models: EchoModels | None = None) -> FastAPI:
    return build_app(models or EchoModels(), KeyRing().verify, GatewaySettings())


def kinds() -> list[tuple[str, GenerationMode]]:
    """Every operation; and wrong requests for those where something can be wrong, be it the key."""
    found = []
    for path, item in application().openapi()["paths"].items():
        for method, operation in item.items():
            label = f"{method.upper()} {path}"
            found.append((label, GenerationMode.POSITIVE))
            if operation.keys() & {"parameters", "requestBody", "security"}:
                found.append((label, GenerationMode.NEGATIVE))
    return found


KINDS = [pytest.param(*kind, id=f"{kind[0]} {kind[1].value}") for kind in kinds()]


@pytest.fixture(scope="module")
def echo() -> Iterator[Server]:
    with serving() as server:
        yield server


def tried(server: Server, label: str, mode: GenerationMode, examples: int) -> int:
    """Raises FailureGroup for an answer that the document doesn't allow. Returns how many requests were sent."""
    document = application().openapi()
    method, _, path = label.partition(" ")
    operation = schemathesis.openapi.from_dict(document)[path][method]
    sent = 0

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def ask(case: Case) -> None:
        nonlocal sent
        headers = {"Authorization": f"Bearer {KeyRing.ADMIN}"}
        case.call_and_validate(base_url=server.url, headers=headers, checks=CHECKS, timeout=20)
        sent += 1

    ask()
    return sent


@pytest.mark.parametrize(("label", "mode"), KINDS)
def test_answers_are_what_the_document_says(echo: Server, label: str, mode: GenerationMode) -> None:
    assert tried(echo, label, mode, examples=15)


@pytest.mark.slow
@pytest.mark.parametrize(("label", "mode"), KINDS)
def test_two_hundred_answers_are_what_the_document_says(echo: Server, label: str, mode: GenerationMode) -> None:
    assert tried(echo, label, mode, examples=200)


class Stubborn(EchoModels):
    """Raises what it is told, whatever it is asked."""

    async def stats(self) -> dict[str, dict[str, float]]:
        assert self.error is not None
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("a fault of ours"), Conflict("a GET has no conflicts")], ids=["fault", "status"])
def test_an_answer_that_is_not_in_the_document_is_found(error: Exception) -> None:
    models = Stubborn()
    models.error = error
    with serving(app=application(models)) as server, pytest.raises(FailureGroup):
        tried(server, "GET /metrics", GenerationMode.POSITIVE, examples=2)
