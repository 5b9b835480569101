"""The published OpenAPI document of the OpenAI API: the part of it in tests/data, and answers that are held against it.

`python -m tests.published SPECIFICATION > tests/data/openai-schemas.json` copies the part anew: every route of the families that a
gateway like this one has a use for, each with the schema of its answer, and what these schemas name.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema

FAMILIES = ("models", "chat/completions", "completions", "embeddings", "organization", "projects")
DATA = Path(__file__).parent / "data" / "openai-schemas.json"
BY_HAND = ("CreateChatCompletionStreamResponse", "ErrorResponse")
"""Schemas of answers that no route's table of answers names."""

_HEAD = {
    "title": "OpenAI API, a part: schemas of the answers that this gateway gives",
    "version": "2.3.0",
    "license": "MIT, see openai-schemas.LICENSE",
}
Route = tuple[str, str]
"""A method in capitals, and a path from /v1 on with the names of its parameters left out: ("GET", "/v1/models/{}")."""


def shape(path: str) -> str:
    """A path without the names of its parameters."""
    return re.sub(r"\{[^/]*\}", "{}", path)


def nullable(node: Any) -> Any:
    """OpenAPI 3.0's `nullable`, which the document still uses here and there, in the words of JSON Schema."""
    if isinstance(node, list):
        return [nullable(item) for item in node]
    if not isinstance(node, dict):
        return node
    plain = {key: nullable(value) for key, value in node.items() if key != "nullable"}
    return {"anyOf": [plain, {"type": "null"}]} if node.get("nullable") is True else plain


DOCUMENT = json.loads(DATA.read_text())
COMPONENTS = nullable(DOCUMENT["components"])
ROUTES: dict[Route, Any] = {
    (method.upper(), "/v1" + shape(path)): nullable(schema)
    for path, operations in DOCUMENT["paths"].items()
    for method, schema in operations.items()
}
"""The schema of each route's answer."""


def check(name: str, answer: Any) -> None:
    """Raises ValidationError for an answer that isn't of the schema of that name."""
    _validate({"$ref": f"#/components/schemas/{name}"}, answer)


def check_route(route: Route, answer: Any) -> None:
    """Raises ValidationError for an answer that the document doesn't have for the route."""
    _validate(ROUTES[route], answer)


def _validate(schema: Any, answer: Any) -> None:
    jsonschema.Draft202012Validator({**schema, "components": COMPONENTS}).validate(answer)


def part(whole: dict[str, Any]) -> dict[str, Any]:
    """What of the published document belongs into tests/data."""
    prefixes = tuple(f"/{family}" for family in FAMILIES)
    paths = {
        path: {method: _answer(operation) for method, operation in item.items() if method in ("get", "post", "delete")}
        for path, item in sorted(whole["paths"].items())
        if path.startswith(prefixes)
    }
    schemas, wanted = whole["components"]["schemas"], [*BY_HAND, *_named(paths)]
    found: dict[str, Any] = {}
    while wanted:
        if (name := wanted.pop()) not in found:
            found[name] = _bare(schemas[name])
            wanted += _named(found[name])
    return {"info": _HEAD, "components": {"schemas": dict(sorted(found.items()))}, "paths": paths}


def _answer(operation: dict[str, Any]) -> Any:
    answers = (answer for status, answer in operation["responses"].items() if status.startswith("2"))
    content = next((answer.get("content", {}) for answer in answers), {})
    return _bare(content.get("application/json", {}).get("schema", {}))


def _bare(node: Any) -> Any:
    """Without prose and examples."""
    if isinstance(node, list):
        return [_bare(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: {name: _bare(inner) for name, inner in value.items()} if key == "properties" else _bare(value)
        for key, value in node.items()
        if key not in ("description", "example", "examples", "title", "deprecated") and not key.startswith("x-")
    }


def _named(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(target := node.get("$ref"), str):
            yield target.rpartition("/")[2]
        node = list(node.values())
    if isinstance(node, list):
        for inner in node:
            yield from _named(inner)


if __name__ == "__main__":
    json.dump(part(json.loads(Path(sys.argv[1]).read_text())), sys.stdout, indent=1)
    sys.stdout.write("\n")
