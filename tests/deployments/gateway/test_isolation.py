"""Whatever names an object x the objects of one tenant x the keys of another: byte for byte as if the object were not there.

Places are those of the OpenAPI document (parameters of paths and queries, strings in bodies), objects those that a tenant has one
of (`whole.py`), so that a later route or kind of object is in the matrix by itself, or fails it. Both databases.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from cluster.errors import NotFound
from cluster.store import metadata
from cluster.tenancy import groups, projects, roles, users
from cluster.tenancy.permissions import INFERENCE
from cluster.tenancy.projects import organizations
from deployments.gateway import limiting, once
from deployments.gateway.scopes import PUBLIC
from tests.cluster.conftest import postgres_url  # noqa: F401 - a fixture
from tests.deployments.gateway.hostile import json_copy, put, smallest, ways
from tests.deployments.gateway.whole import OPERATIONS, Operation, Tenant, Whole, kind_of, whole

SHARED = frozenset({"models", "versions", "rate_limits"})
"""Kinds whose names mean the same to every tenant; what of them a project may see is the last test's."""
OWN = re.compile(
    r'(?<="last_used_at":)(?:null|\d+)'
    r'|(?<="token":")[\w-]+'
    r"|\b(?:mk_\w+|[a-z_]+_[0-9a-f]{8,}z*|[0-9a-f]{12,}|\d{9,}|\d+@example\.org|one \d+)\b|mk_\w+…?\w*"
)
"""What is new in every answer: ids (with nobody's, which things may have been called since), keys, times, addresses; and when a key
was used last, which changes by itself."""


@dataclass
class Pair:
    """Two tenants alike: `theirs` is asked for with the keys of `mine`."""

    gateway: Whole
    theirs: Tenant
    mine: Tenant

    def rows(self) -> dict[str, list[Any]]:
        """All that is stored, but when keys were used."""
        with self.gateway.store.read() as connection:
            tables = {table.name: connection.execute(sa.select(table)).mappings().all() for table in metadata.sorted_tables}
        return {name: [{k: v for k, v in row.items() if k != "last_used_at"} for row in rows] for name, rows in tables.items()}

    def their_rows(self) -> set[str]:
        """Those that name anything of theirs."""
        named = re.compile("|".join([self.theirs.organization, *owned(self.theirs).values()]))
        return {f"{name} {row}" for name, rows in self.rows().items() for row in rows if named.search(str(row))}


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    url = request.getfixturevalue("postgres_url") if request.param == "postgres" else None
    with whole(tmp_path_factory.mktemp("isolation"), url) as gateway:
        yield Pair(gateway, gateway.tenant("theirs"), gateway.tenant("mine"))


def nobodys(identifier: str) -> str:
    return f"{identifier[:-4]}zzzz"


def said(answer: httpx.Response, *named: str) -> tuple[int, str]:
    """Without the id that was asked for, and what is new in every answer."""
    text = answer.text
    for name in named:
        text = text.replace(name, "#")
    return answer.status_code, OWN.sub("#", text)


def in_paths() -> Iterator[tuple[Operation, list[str]]]:
    """Each owned parameter of a path alone, and all together."""
    for operation in OPERATIONS:
        owned = [name for name, kind in zip(operation.parameters, operation.kinds, strict=True) if kind not in SHARED]
        yield from ((operation, [name]) for name in owned)
        if len(owned) > 1:
            yield operation, owned


def told_apart_in_paths(pair: Pair) -> list[str]:
    """Where a path with somebody else's object is not answered like one with none."""
    found = []
    for operation, names in in_paths():
        ids = {name: pair.theirs.ids[kind_of(operation.path, name)] for name in names}
        answers = []
        for chosen in (ids, {name: nobodys(id) for name, id in ids.items()}):
            path = pair.mine.path(operation.path, **chosen)
            answers.append(said(pair.mine.ask(operation, path=path), *chosen.values()))
        if answers[0] != answers[1] or answers[0][0] != 404:
            found.append(f"{operation} {names}: {answers}")
    return found


def strings(operation: Operation) -> Iterator[tuple[str, Callable[[Tenant, str], dict[str, Any]]]]:
    """Where else an operation takes a string: what it is called, and the options of a call by a tenant that has a text there."""
    for parameter in operation.facts.get("parameters", ()):
        if parameter["in"] == "query" and "string" in str(parameter["schema"]):
            yield f"query {parameter['name']}", partial(in_query, operation, parameter["name"])
    for way in ways(operation.body or {}, ()):
        yield f"body {way}", partial(in_body, operation, way)


def in_query(operation: Operation, name: str, tenant: Tenant, text: str) -> dict[str, Any]:
    return {"params": tenant.query(operation) | {name: text}}


def in_body(operation: Operation, way: tuple[str | int, ...], tenant: Tenant, text: str) -> dict[str, Any]:
    """What must stand around the text is right."""
    body: dict[str, Any] = json_copy(tenant.body(operation))
    put(body, operation.body or {}, way, text)
    around: dict[str, Any] = meant(body, tenant.given(operation) | {"id": tenant.ids["projects"]})
    put(around, operation.body or {}, way, text)
    return {"json": around}


def meant(node: Any, given: Mapping[str, Any]) -> Any:
    """With what fields say in the place of what `hostile.smallest` puts there."""
    if isinstance(node, list):
        return [meant(item, given) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        name: given.get(name, value) if value == smallest({"type": "string"}) else meant(value, given)
        for name, value in node.items()
    }


def told_apart_elsewhere(pair: Pair, kinds: Mapping[str, str], *, everywhere: bool = False) -> list[str]:
    """Where somebody else's id in a query or body is not answered like nobody's. An id is tried where the place is called like its
    kind, and in a place that is called like none ids take turns; or every id `everywhere`."""
    found, turns = [], itertools.cycle(kinds)
    for operation in OPERATIONS:
        if operation.scope != INFERENCE:
            for place, options in strings(operation):
                called = [kind for kind in kinds if kind.split()[-1].removesuffix("s") in place]
                for kind in kinds if everywhere else called or [next(turns)]:
                    identifier = kinds[kind]
                    answers = [
                        said(pair.mine.ask(operation, **options(pair.mine, id)), id) for id in (identifier, nobodys(identifier))
                    ]
                    if answers[0] != answers[1]:
                        found.append(f"{operation} {place} {kind}: {answers}")
    return found


def owned(tenant: Tenant) -> dict[str, str]:
    return {kind: id for kind, id in tenant.ids.items() if kind not in SHARED and id}


def test_enough_is_in_the_matrix(pair: Pair) -> None:
    assert len(list(in_paths())) > 90
    assert len(owned(pair.theirs)) >= 9
    assert len(pair.mine.made) > 10


def test_paths_to_objects_of_others_lead_nowhere(pair: Pair) -> None:
    before = pair.rows()
    assert told_apart_in_paths(pair) == []
    assert pair.rows() == before


def test_bodies_and_queries_that_name_objects_of_others_name_nothing(pair: Pair) -> None:
    before = pair.their_rows()
    assert len(before) > 15
    assert told_apart_elsewhere(pair, owned(pair.theirs)) == []
    assert before - pair.their_rows() == set()


@pytest.mark.slow
@pytest.mark.skipif("FUZZ_EXAMPLES" not in os.environ, reason="takes minutes: make fuzz")
@pytest.mark.timeout(7200)
def test_every_object_in_every_body_and_query_names_nothing(pair: Pair) -> None:
    before = pair.their_rows()
    assert told_apart_elsewhere(pair, owned(pair.theirs), everywhere=True) == []
    assert before - pair.their_rows() == set()


def careless(find: Any) -> Any:
    """A lookup that forgets whose object it is."""

    def found(connection: sa.Connection, organization: str, *rest: Any) -> Any:
        for other in [organization, *connection.scalars(sa.select(organizations.c.id)).all()]:
            try:
                return find(connection, other, *rest)
            except NotFound as error:
                reason = error
        raise reason

    return found


def test_an_id_in_a_body_that_is_taken_for_ours_is_found(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Pair(pair.gateway, pair.theirs, pair.gateway.tenant())
    monkeypatch.setattr(users, "find", careless(users.find))
    assert any("body" in found for found in told_apart_elsewhere(fresh, {"users": pair.theirs.ids["users"]}))


def test_a_model_that_a_project_may_not_use_answers_like_none(pair: Pair) -> None:
    tenant = pair.gateway.tenant()
    forbid_echo(pair.gateway, tenant)
    assert told_apart_by_model(tenant) == []


def test_a_model_that_is_only_refused_is_found(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    tenant = pair.gateway.tenant()
    forbid_echo(pair.gateway, tenant)

    async def everything(entrance: Any, notes: Any) -> Any:
        return await entrance.models.list(), await entrance.models.adapters()

    monkeypatch.setattr(limiting, "permitted", everything)
    assert told_apart_by_model(tenant)


def forbid_echo(gateway: Whole, tenant: Tenant) -> None:
    gateway.accounts.model_permissions.put(tenant.ids["projects"], "deny_list", ["echo"])


def told_apart_by_model(tenant: Tenant) -> list[str]:
    """Where a model that there is, and isn't for this project, is not answered like one that there isn't."""
    found = []
    for operation in OPERATIONS:
        body = operation.body or {}
        in_path, in_body = "models" in operation.kinds, "model" in body.get("properties", {})
        if operation.scope == INFERENCE and (in_path or in_body):
            answers = []
            for name in ("echo", "nobody"):
                path = tenant.path(operation.path, model=name) if in_path else tenant.path(operation.path)
                sent = (tenant.body(operation) or {}) | ({"model": name} if in_body else {})
                answers.append(said(tenant.ask(operation, path=path, json=sent if operation.body else None), name))
            if answers[0] != answers[1] or answers[0][0] != 404:
                found.append(f"{operation}: {answers}")
    return found


def replayed_to_others(pair: Pair) -> list[str]:
    """Where a key of idempotency that they have used means anything to us."""
    theirs, mine, found = pair.gateway.tenant(), pair.gateway.tenant(), []
    for operation in OPERATIONS:
        if operation.method != "GET" and operation.scope not in ("admin", PUBLIC):
            key = {"Idempotency-Key": str(operation)}
            body = theirs.body(operation)
            first, again = theirs.ask(operation, headers=key, json=body), mine.ask(operation, headers=key, json=body)
            if "idempotent-replayed" in again.headers or "Idempotency-Key" in again.text:
                found.append(f"{operation}: {first.status_code}, then {again.status_code} {again.text[:80]}")
    return found


def test_idempotency_keys_of_others_mean_nothing(pair: Pair) -> None:
    assert replayed_to_others(pair) == []


def test_idempotency_keys_that_all_administrators_share_are_found(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "owner_of", lambda principal: principal.tenant)
    assert replayed_to_others(pair)


@pytest.mark.parametrize("module", [projects, users, groups, roles], ids=lambda module: module.__name__)
def test_a_lookup_that_forgets_the_organization_is_found_in_paths(pair: Pair, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Pair(pair.gateway, pair.gateway.tenant(), pair.mine)  # theirs may be lost by it
    monkeypatch.setattr(module, "find", careless(module.find))
    assert told_apart_in_paths(fresh)
