"""Bounds on what comes in, checked on the bytes that arrive and not on what a header claims.

Pure functions, except for `read_body`, which owns the only place where a request body enters memory.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import msgspec
from starlette.types import Receive

from cluster.errors import InvalidRequest, PayloadTooLarge
from deployments.gateway.errors import ClientGone, RequestTooSlow

OFF_LOOP_BYTES = 64 << 10
"""Longer bodies are decoded in a thread, so that one caller's megabytes never stop the others' tokens."""

_LONG_NUMBER = re.compile(rb"\d{19}")
INT64, UINT64 = range(-(1 << 63), 1 << 63), range(-(1 << 63), 1 << 64)
"""Integers that a body may hold: those of 64 bits; in tensors the unsigned ones, too."""


async def read_body(receive: Receive, max_bytes: int, seconds: float) -> bytes:
    """The whole body. Raises PayloadTooLarge at the first byte too many, RequestTooSlow for one that dribbles."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                size += len(part)
                if size > max_bytes:
                    raise PayloadTooLarge(f"The body is longer than {max_bytes} bytes.")
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise RequestTooSlow(f"The body did not arrive within {seconds:g} s.") from None


async def read_json(raw: bytes, max_depth: int) -> dict[str, Any]:
    """`decode_json`, beside the event loop for long bodies."""
    if len(raw) < OFF_LOOP_BYTES:
        return decode_json(raw, max_depth)
    return await asyncio.to_thread(decode_json, raw, max_depth)


def decode_json(raw: bytes, max_depth: int, integers: range = INT64) -> dict[str, Any]:
    """One JSON object as RFC 8259 has it: no NaN, no Infinity, no lone surrogates, no integer beyond 64 bits, not too deep."""
    try:
        tree = msgspec.json.decode(raw)
    except RecursionError:
        raise InvalidRequest(f"The body is nested deeper than {max_depth} levels.", code="invalid_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {_reason(error)}.", code="invalid_json") from None
    if not isinstance(tree, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    if raw.count(b"{") + raw.count(b"[") > max_depth or _LONG_NUMBER.search(raw):
        _inspect(tree, max_depth, integers)
    return tree


def through_json(tree: object, max_bytes: int, max_depth: int, integers: range = INT64) -> dict[str, Any]:
    """A body that came as Python objects over a handle, held to the same bounds as one that came as bytes."""
    try:
        raw = json.dumps(tree, allow_nan=False, ensure_ascii=False).encode()
    except RecursionError:
        raise InvalidRequest(f"The body is nested deeper than {max_depth} levels.", code="invalid_json") from None
    except (TypeError, ValueError):  # not JSON's types, NaN, a cycle, a lone surrogate
        raise InvalidRequest("The body can't be written as JSON.", code="invalid_json") from None
    if len(raw) > max_bytes:
        raise PayloadTooLarge(f"The body is longer than {max_bytes} bytes.")
    return decode_json(raw, max_depth, integers)


def _inspect(tree: dict[str, Any], max_depth: int, integers: range) -> None:
    level: list[Any] = [tree]
    for _ in range(max_depth):
        level = [child for container in level for child in (container.values() if isinstance(container, dict) else container)]
        if any(type(value) is int and value not in integers for value in level):
            raise InvalidRequest("The body holds an integer of more than 64 bits.", code="invalid_json")
        level = [child for child in level if isinstance(child, (dict, list))]
        if not level:
            return
    raise InvalidRequest(f"The body is nested deeper than {max_depth} levels.", code="invalid_json")


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, msgspec.ValidationError):
        return "a number is out of range"
    return str(error).removeprefix("JSON is malformed: ")
