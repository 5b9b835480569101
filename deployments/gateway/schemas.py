"""Bodies in the OpenAPI document. They are read by `limits` and `oip/wire.py`, which FastAPI's reader can't replace."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def takes(kind: type[BaseModel]) -> dict[str, Any]:
    """A route's request body."""
    schema = kind.model_json_schema(ref_template="{model}")
    parts = schema.pop("$defs", {})
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(schema, parts)}}}}


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:
    """The schema with its named parts in their places; ours never contain themselves."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(parts[schema["$ref"]], parts)
        return {key: _inlined(value, parts) for key, value in schema.items()}
    return [_inlined(item, parts) for item in schema] if isinstance(schema, list) else schema
