"""Our OpenAPI document against the whole gateway, by schemathesis: right and wrong requests to every operation, and walks.

No answer is a fault of ours, none has a status, a type or a form that the document doesn't name. `FUZZ_EXAMPLES` says how many
requests of a kind an operation gets, 10 unless it is set; `make fuzz` asks for 200. Planted bugs are found.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.generation.stateful import run_state_machine_as_test
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from cluster.errors import Conflict
from deployments.gateway.openai.admin import answers
from tests.deployments.gateway.whole import OPERATIONS, REFERENCES, Operation, Tenant, Whole, document, operations, whole

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "10"))
CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    stateful_step_count=8,
)
SCHEMA = schemathesis.openapi.from_dict(document())
BY_NAME = {str(operation): operation for operation in OPERATIONS}


def kinds() -> list[tuple[Operation, GenerationMode]]:
    """Every operation; and wrong requests for those where something can be wrong, be it the key."""
    return [
        (operation, mode)
        for operation in OPERATIONS
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        if mode is GenerationMode.POSITIVE or operation.facts.keys() & {"parameters", "requestBody", "security"}
    ]


KINDS = [pytest.param(*kind, id=f"{kind[0]} {kind[1].value}") for kind in kinds()]


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """Requests by the class of their answer, told at the end."""
    counted: Counter[str] = Counter()
    yield counted
    told = request.config.get_terminal_writer()
    told.line(f"\n{sum(counted.values())} requests to {len(OPERATIONS)} operations: {dict(sorted(counted.items()))}")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    with whole(tmp_path_factory.mktemp("document")) as gateway:
        yield gateway


def tried(gateway: Whole, operation: Operation, mode: GenerationMode, tally: Counter[str] | None = None) -> None:
    """Raises FailureGroup for an answer that the document doesn't allow."""
    is_right, described = mode is GenerationMode.POSITIVE, SCHEMA[operation.path][operation.method]
    tenant = gateway.tenant_for(operation) if is_right else gateway.shared

    @given(case=described.as_strategy(generation_mode=mode), real=st.booleans())
    @SETTINGS
    def ask(case: Case, real: bool) -> None:
        if real and is_right:
            put_ours(case, operation, tenant)
        answer = called(case, operation, gateway, tenant)
        if tally is not None:
            tally[f"{answer.status_code // 100}xx"] += 1

    ask()


def called(case: Case, operation: Operation, gateway: Whole, tenant: Tenant) -> Any:
    headers = {"Authorization": f"Bearer {gateway.key(operation, tenant)}"}
    return case.call_and_validate(base_url=gateway.server.url, headers=headers, checks=CHECKS, timeout=20)


def put_ours(case: Case, operation: Operation, tenant: Tenant) -> None:
    """Objects that exist in the places of invented ones."""
    for name, kind in zip(operation.parameters, operation.kinds, strict=True):
        case.path_parameters[name] = tenant.ids[kind]
    if isinstance(case.body, dict):
        case.body |= {name: tenant.ids[kind] for name, kind in REFERENCES.items() if name in case.body}


def test_the_document_is_that_of_the_gateway_as_it_runs(gateway: Whole) -> None:
    """What a part of it brings is in `OPERATIONS`, and so in every test that is made of them."""
    assert set(operations(gateway.app.openapi())) == set(OPERATIONS)
    assert len(OPERATIONS) > 100


@pytest.mark.parametrize(("operation", "mode"), KINDS)
def test_answers_are_what_the_document_says(
    gateway: Whole, operation: Operation, mode: GenerationMode, tally: Counter[str]
) -> None:
    tried(gateway, operation, mode, tally)


def linked() -> list[str]:
    """The operations that links lead from or to, but for the end of projects: keys end with them."""
    links = {str(one.facts["operationId"]): one.facts["responses"].get("200", {}).get("links", {}) for one in OPERATIONS}
    return [name for name in {*(name for name, to in links.items() if to), *chain(*links.values())} if "archive" not in name]


@pytest.mark.timeout(300 + 20 * EXAMPLES)
def test_walks_along_links_are_what_the_document_says(gateway: Whole, tally: Counter[str]) -> None:
    """What one answer names is asked for next, changed, deleted and asked for again."""
    followed: Counter[str] = Counter()

    schema = SCHEMA.include(operation_id=linked())
    schema.config.generation.update(modes=[GenerationMode.POSITIVE])

    class Walk(schema.as_state_machine()):  # type: ignore[misc]
        def setup(self) -> None:
            self.tenant = gateway.tenant()

        def get_call_kwargs(self, case: Case) -> dict[str, Any]:
            key = gateway.key(BY_NAME[case.operation.label], self.tenant)
            return {"base_url": gateway.server.url, "headers": {"Authorization": f"Bearer {key}"}, "timeout": 20}

        def validate_response(self, response: Any, case: Case, additional_checks: Any = None, **options: Any) -> None:
            tally[f"{response.status_code // 100}xx"] += 1
            followed[f"{case.operation.label} {response.status_code // 100}xx"] += 1
            case.validate_response(response, checks=CHECKS)

    run_state_machine_as_test(Walk, settings=settings(SETTINGS, max_examples=3 * EXAMPLES))
    there = [name for name in followed if "{" in name and name.endswith("2xx")]
    assert len(there) > 1, f"no walk came to objects that other requests made: {followed}"


@pytest.mark.parametrize("error", [RuntimeError("a fault of ours"), Conflict("a GET has no conflicts")], ids=["fault", "status"])
def test_an_answer_that_is_not_in_the_document_is_found(error: Exception, gateway: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stats() -> dict[str, dict[str, float]]:
        raise error

    monkeypatch.setattr(gateway.server.models, "stats", stats)
    with pytest.raises(FailureGroup):
        tried(gateway, BY_NAME["GET /metrics"], GenerationMode.POSITIVE)


def test_a_field_that_is_not_in_the_document_is_found(gateway: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    real = answers.project
    monkeypatch.setattr(answers, "project", lambda project: {**real(project), "created_at": None})
    with pytest.raises(FailureGroup):
        tried(gateway, BY_NAME["POST /v1/organization/projects"], GenerationMode.POSITIVE)
