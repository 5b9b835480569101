"""The whole gateway over a real store, and tenants alike that have one of everything: what tests are generated over.

`OPERATIONS` are all routes of an application that has every part. Objects are made over HTTP by the routes that make them: a path
that ends in a parameter has its object from the POST on the path before it, so that later kinds of objects come by themselves.
What a tenant can't be given that way fails `Tenant.path` by name.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from cluster.settings import GatewaySettings, Settings
from cluster.store import Store
from cluster.tenancy.accounts import Accounts
from cluster.tenancy.chain import Actor
from cluster.tenancy.permissions import INFERENCE
from cluster.tenancy.projects import DEFAULT
from cluster.tenancy.rating import PriceList
from deployments.gateway.app import build_app
from deployments.gateway.keys import Verify
from deployments.gateway.scopes import PUBLIC
from deployments.gateway.tenancy import Tenancy
from deployments.gateway.wire import Wire
from tests.deployments.gateway.conftest import Server, serving
from tests.deployments.gateway.hostile import branches, resolved, smallest
from tests.fakes import EchoModels

PARAMETER = re.compile(r"\{(\w+)(?::path)?\}")
_serial = itertools.count()
_http = httpx.Client(timeout=30, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))


@dataclass(frozen=True)
class Operation:
    """A method on a path, as the OpenAPI document has it."""

    method: str
    path: str
    facts: Mapping[str, Any] = field(hash=False, compare=False)

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def scope(self) -> str:
        return str(self.facts["x-scope"])

    @property
    def parameters(self) -> list[str]:
        """Of the path."""
        return PARAMETER.findall(self.path)

    @property
    def kinds(self) -> list[str]:
        """What its path's parameters name."""
        return [kind_of(self.path, name) for name in self.parameters]

    @property
    def body(self) -> Mapping[str, Any] | None:
        """The schema of its body."""
        content = self.facts.get("requestBody", {}).get("content", {})
        found: Mapping[str, Any] | None = content.get("application/json", {}).get("schema")
        return found


def operations(document: Mapping[str, Any]) -> list[Operation]:
    return [
        Operation(method.upper(), path, facts)
        for path, item in resolved(document["paths"], document).items()
        for method, facts in item.items()
    ]


@cache
def document() -> dict[str, Any]:
    """Of an application with every part, over a store that nobody opens."""
    tenancy = Tenancy(Accounts(Store("sqlite:////nowhere/mmaas.db"), b""))
    app = build_app(EchoModels(), tenancy.accounts.keys.verify, GatewaySettings(), tenancy=tenancy)  # type: ignore[union-attr]
    found: dict[str, Any] = json.loads(json.dumps(app.openapi()))
    return found


OPERATIONS = operations(document())


OF_PROJECTS = frozenset({"roles", "spend_alerts"})
"""Kinds that organizations have, and projects have others of."""


def kind_of(path: str, parameter: str) -> str:
    """What a parameter of a path names: the word before it."""
    before = path[: re.search(rf"\{{{parameter}(?::path)?\}}", path).start()].rstrip("/")  # type: ignore[union-attr]
    word = before.rpartition("/")[2]
    return f"project {word}" if word in OF_PROJECTS and "/projects/" in path else word


REFERENCES = {"user_id": "users", "group_id": "groups", "role_id": "roles", "project_id": "projects", "api_key_id": "api_keys"}
"""Fields of bodies that name an object, and of which kind."""

PLAIN: dict[str, Any] = {
    "role": "owner",
    "model_ids": ["echo"],
    "model": "echo",
    "prompt": "one two",
    "input": "one two",
    "messages": [{"role": "user", "content": "one two"}],
    "query": "one two",
    "documents": ["one two"],
    "inputs": [{"name": "input-0", "shape": [1, 1], "datatype": "FP64", "data": [1.0]}],
    "encoding_format": "float",
    "currency": "USD",
    "recipients": ["ada@example.org"],
    "interval": "month",
}
"""What fields mean that a schema can't say."""

OPTIONAL = frozenset({*REFERENCES, "encoding_format"})
"""What is said where it may be."""


@dataclass
class Tenant:
    """An organization with a key that may do everything in it, and what it has: ids by kind."""

    server: Server
    organization: str
    owner_key: str
    project_key: str = ""
    ids: dict[str, str] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)  # the operations that made something

    def path(self, path: str, **others: str) -> str:
        """With ids of ours, or those of `others`, in the place of parameters. Raises AssertionError for a kind we have none of."""

        def put(match: re.Match[str]) -> str:
            kind = kind_of(path, match[1])
            assert kind in self.ids, f"{path}: teach tests/deployments/gateway/whole.py to make one of {kind!r} for {match[1]}"
            return others.get(match[1], self.ids[kind])

        return PARAMETER.sub(put, path)

    def key(self, operation: Operation) -> str:
        """Ours with the most rights for an operation."""
        return self.project_key if operation.scope in (INFERENCE, PUBLIC) else self.owner_key

    def given(self, operation: Operation) -> dict[str, Any]:
        """What fields of a body say, with objects of ours."""
        ours = {name: self.ids[kind] for name, kind in REFERENCES.items() if kind in self.ids}
        if operation.path.startswith("/v1/projects/"):
            ours["role_id"] = self.ids.get("project roles", "")
        permissions = ["annotate" if "/projects/" in operation.path else "keys.read"]
        new = {"name": f"one {next(_serial)}", "role_name": f"one {next(_serial)}", "email": f"{next(_serial)}@example.org"}
        return PLAIN | ours | new | {"permissions": permissions}

    def body(self, operation: Operation) -> dict[str, Any] | None:
        """A right body."""
        return None if operation.body is None else filled(operation.body, self.given(operation))

    def query(self, operation: Operation) -> dict[str, Any]:
        """What the query must have."""
        needed = [one for one in operation.facts.get("parameters", ()) if one["in"] == "query" and one.get("required")]
        return {one["name"]: PLAIN.get(one["name"], smallest(one["schema"])) for one in needed}

    def ask(self, operation: Operation, key: str | None = None, **options: Any) -> httpx.Response:
        """By default a right call of ours."""
        path = options.pop("path", None) or self.path(operation.path)
        options = {"json": self.body(operation), "params": self.query(operation) or None} | options
        headers = {"Authorization": f"Bearer {key or self.key(operation)}"} | options.pop("headers", {})
        return _http.request(operation.method, self.server.url + path, headers=headers, **options)

    def make(self, operation: Operation) -> None:
        """The object that a parameter behind a POST's path stands for: its answer has the id, or its body has."""
        answer, path = self.ask(operation), operation.path
        assert answer.status_code == 200, f"{operation}: {answer.text}"
        said, kind = answer.json(), kind_of(path + "/{one}", "one")
        self.ids.setdefault(kind, said.get("id", ""))
        if isinstance(key := said.get("api_key"), dict):
            self.ids["api_keys"], self.project_key = key["id"], key["value"]
        self.made.append(str(operation))


def filled(schema: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the schema needs, and what else of `given` it has a place for that is needed or names something."""
    fields = next(branch for branch in branches(schema) if branch.get("type") == "object")
    body: dict[str, Any] = smallest(fields)
    for name, inner in fields.get("properties", {}).items():
        if name in body and isinstance(body[name], dict):
            body[name] = filled(inner, given)
        elif name in given and (name in body or name in OPTIONAL) and takes(inner, given[name]):
            body[name] = given[name]
    return body


def takes(schema: Mapping[str, Any], value: Any) -> bool:
    """Whether a value is of the schema's type, and one of those it lists."""
    kinds = {str: "string", list: "array", dict: "object"}
    return any(
        branch.get("type") == kinds[type(value)] and value in branch.get("enum", [value]) and branch.get("const", value) == value
        for branch in branches(schema)
    )


@dataclass
class Whole:
    """The application, what stands behind it, and its operator's key."""

    app: FastAPI
    server: Server
    store: Store
    settings: Settings
    tenancy: Tenancy
    operator_key: str

    @property
    def accounts(self) -> Accounts:
        assert self.tenancy.accounts is not None
        return self.tenancy.accounts.by(Actor("system", "tests"))

    def key(self, operation: Operation, tenant: Tenant) -> str:
        """The tenant's, or the operator's where an operation is about the platform."""
        return self.operator_key if operation.scope == "admin" else tenant.key(operation)

    def tenant_for(self, operation: Operation) -> Tenant:
        """A new one where the operation may change what others need."""
        return self.tenant() if operation.method != "GET" and operation.parameters else self.shared

    @cached_property
    def shared(self) -> Tenant:
        """One that nobody changes much."""
        return self.tenant("shared")

    def tenant(self, name: str = "tenant") -> Tenant:
        """A new one with one of everything."""
        organization = self.accounts.projects.found(f"{name}{next(_serial)}").id
        _, key = self.accounts.keys.create_admin(organization, "root", ["organization"])
        made = Tenant(self.server, organization, key)
        made.ids |= {"models": "echo", "versions": "1", "rate_limits": "rl-echo"}
        invites = next(one for one in OPERATIONS if str(one) == "POST /v1/organization/invites")
        token = made.ask(invites).json()["token"]
        made.ids["users"] = self.accounts.invites.accept(token, "Ada").id
        made.ids["invoices"] = self.accounts.invoices.issue(organization, "2025-10").id
        for operation in sorted(OPERATIONS, key=lambda one: (len(one.parameters), one.path.count("/"))):
            behind = [other for other in OPERATIONS if re.fullmatch(re.escape(operation.path) + r"/\{\w+\}", other.path)]
            is_alone = operation.path.endswith("/spend_limit")  # there is one, which no id names
            if operation.method == "POST" and operation.scope != INFERENCE and (behind or is_alone):
                made.make(operation)
        return made


@contextlib.contextmanager
def whole(
    directory: Path,
    database_url: str | None = None,
    models: EchoModels | None = None,
    verify: Verify | None = None,
    wire: type[Wire] = Wire,
) -> Iterator[Whole]:
    """With a home in `directory`, and the store there or in an empty Postgres, which is left empty. Keys are the store's, unless
    something else is to verify them."""
    settings = Settings(home=directory, database_url=database_url)
    store = Store(settings.store_url)
    store.migrate()
    tenancy, models = Tenancy.of(store, settings), models or EchoModels()
    assert tenancy.accounts is not None
    app = build_app(models, verify or tenancy.accounts.keys.verify, settings.gateway, tenancy=tenancy)
    builder = tenancy.accounts.by(Actor("system", "tests"))
    builder.prices.publish("default", PriceList(currency="USD"))  # the only one that the published document knows
    _, operator = builder.keys.create_admin(DEFAULT, "operator", ["admin"])
    try:
        with serving(models, app=app, wire=wire) as server:
            yield Whole(app, server, store, settings, tenancy, operator)
    finally:
        store.downgrade("base")
        store.close()
