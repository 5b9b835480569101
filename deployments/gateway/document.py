"""Completes the OpenAPI document with what routes don't say themselves: who may call them, and how each may refuse.

A test holds the answers of every route against it, so a status that isn't here may not be answered.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI

from deployments.gateway.protocols import is_open_inference
from deployments.gateway.scopes import PUBLIC, ScopedRoute

Document = dict[str, Any]

ANYWHERE = (400, 408, 413, 421, 500, 503)
"""How any route may refuse, whoever asks: heads, bodies and a full house."""
WITH_KEY = (401, 403, 404, 429)
DOING = (409, 422, 504)
"""Of a route that does something: a conflict, an idempotency key of another call, and a model that takes too long."""
ONCE = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Calls with the same key are executed once; the first answer is given again for a day.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"},
}

_REFUSALS = {
    is_open: {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    for is_open, name in ((False, "ErrorResponse"), (True, "Failure"))
}
"""By whether a path belongs to the Open Inference Protocol."""
_STREAM = {"text/event-stream": {"schema": {"type": "string", "description": "Chunks, if `stream` is true."}}}


def openapi(app: FastAPI) -> Document:
    """In the place of FastAPI's own `openapi`."""
    if app.openapi_schema is None:
        found = FastAPI.openapi(app)
        found.setdefault("components", {}).setdefault("securitySchemes", {})["key"] = {"type": "http", "scheme": "bearer"}
        for route in app.routes:
            if isinstance(route, ScopedRoute) and route.include_in_schema:
                for method in route.methods or ():
                    _complete(found["paths"][route.path_format][method.lower()], method, route)
        _link(found)
    assert app.openapi_schema is not None
    return app.openapi_schema


def _complete(operation: Document, method: str, route: ScopedRoute) -> None:
    scope, refusal = route.scope, _REFUSALS[is_open_inference(route.path)]
    operation["x-scope"] = scope
    if scope != PUBLIC:
        operation["security"] = [{"key": []}]
    does = scope != PUBLIC and method != "GET"
    if does:
        operation.setdefault("parameters", []).append(ONCE)
    _name_the_rest(operation, route.path_format)
    answers = operation["responses"]
    for not_ours in ("default", "422"):  # FastAPI's own, which it would answer where we say 400
        answers.pop(not_ours, None)
    for status in (*ANYWHERE, *(WITH_KEY if scope != PUBLIC else ()), *(DOING if does else ())):
        answers.setdefault(str(status), {"description": HTTPStatus(status).phrase, "content": refusal})
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    if "stream" in body.get("properties", {}):
        answers["200"]["content"] |= _STREAM


def _name_the_rest(operation: Document, path: str) -> None:
    """Parameters of the path that an endpoint reads from the request itself."""
    named = {parameter["name"] for parameter in operation.get("parameters", ())}
    for name in re.findall(r"\{(\w+)\}", path):
        if name not in named:
            parameter = {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            operation.setdefault("parameters", []).append(parameter)


def _link(document: Document) -> None:
    """From an answer that names what a POST made to the operations on it, with the parameters that the POST's own path had."""
    schemas, paths = document["components"]["schemas"], document["paths"]
    for path, item in paths.items():
        answer = item.get("post", {}).get("responses", {}).get("200", {})
        schema = answer.get("content", {}).get("application/json", {}).get("schema", {}).get("$ref", "").rpartition("/")[2]
        if "id" in schemas.get(schema, {}).get("properties", {}):
            same = {name: f"$request.path.{name}" for name in re.findall(r"\{(\w+)\}", path)}
            for other, operations in paths.items():
                if match := re.fullmatch(re.escape(path) + r"/\{(\w+)\}(/[^{]*)?", other):
                    parameters = same | {match[1]: "$response.body#/id"}
                    for name in (operation["operationId"] for operation in operations.values()):
                        answer.setdefault("links", {})[name] = {"operationId": name, "parameters": parameters}
