"""Bodies of the Open Inference Protocol: a JSON object, with Triton's extension raw tensors behind it, all perhaps compressed.

The header `Inference-Header-Content-Length` has the length of the JSON before compression; without it a body is all JSON. What kind
a body is, is never told by its content type, which tritonclient doesn't send.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from cluster.errors import InvalidRequest, PayloadTooLarge
from deployments.gateway import limits

JSON_LENGTH = "inference-header-content-length"
CODINGS = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
"""Content codings with zlib's word for them; `deflate` is zlib's own format (RFC 9110)."""
LEVEL = 1
"""Of compression: numbers hardly get smaller with more effort."""


class Body(NamedTuple):
    tree: dict[str, Any]
    binary: memoryview


class Reply(NamedTuple):
    content: bytes
    headers: dict[str, str]


def read(raw: bytes, headers: Any, *, max_bytes: int, max_depth: int) -> Body:
    """Raises InvalidRequest and PayloadTooLarge. May take long for a long body. `headers` maps lower-case names to texts."""
    raw = inflated(raw, headers.get("content-encoding", "identity"), max_bytes)
    length = headers.get(JSON_LENGTH)
    if length is None:
        return Body(_object(raw, max_depth), memoryview(b""))
    if not (length.isascii() and length.isdigit()) or len(length) > 18 or not 0 < int(length) <= len(raw):
        raise InvalidRequest(
            f"Inference-Header-Content-Length must be the length of the JSON at the beginning of the body, within 1 and {len(raw)}."
        )
    return Body(_object(raw[: int(length)], max_depth), memoryview(raw)[int(length) :])


def _object(raw: bytes, max_depth: int) -> dict[str, Any]:
    return limits.decode_json(raw, max_depth, limits.UINT64) if raw else {}


def inflated(raw: bytes, coding: str, max_bytes: int) -> bytes:
    """The body without its coding. Never more than `max_bytes` are made. Raises InvalidRequest and PayloadTooLarge."""
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return raw
    if coding not in CODINGS:
        raise InvalidRequest(f"Content-Encoding must be one of identity, {', '.join(CODINGS)}.")
    stream = zlib.decompressobj(CODINGS[coding])
    try:
        content = stream.decompress(raw, max_bytes + 1)
    except zlib.error:
        raise InvalidRequest(f"The body is not valid {coding}.") from None
    if len(content) > max_bytes:
        raise PayloadTooLarge(f"The body is longer than {max_bytes} bytes when it is unpacked.")
    if not stream.eof or stream.unused_data:
        raise InvalidRequest(f"The body is not one whole {coding} stream.")
    return content


def written(tree: object, binary: Sequence[bytes], accepted: str) -> Reply:
    """The body of an answer, in the first of our codings that the caller accepts. May take long for a long one."""
    head = msgspec.json.encode(tree)
    headers = {"content-type": "application/json", "vary": "accept-encoding"}
    if binary:
        headers |= {"content-type": "application/octet-stream", JSON_LENGTH: str(len(head))}
    content = b"".join([head, *binary])
    coding = chosen(accepted)
    if coding is None:
        return Reply(content, headers)
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, CODINGS[coding])
    return Reply(packer.compress(content) + packer.flush(), headers | {"content-encoding": coding})


def chosen(accepted: str) -> str | None:
    """The coding for an answer, by an Accept-Encoding header: the one of ours with the greatest weight, None for identity."""
    weights = dict(_weights(accepted))
    fitting = [(weights.get(coding, weights.get("*", 0.0) if coding == "gzip" else 0.0), coding) for coding in CODINGS]
    weight, coding = max(fitting, key=lambda pair: pair[0])
    return coding if weight > 0 and weight >= weights.get("identity", 0.0) else None


def _weights(accepted: str) -> Iterable[tuple[str, float]]:
    for part in accepted.lower().split(",")[:16]:
        coding, _, parameters = part.partition(";")
        name, _, value = parameters.strip().partition("=")
        try:
            weight = float(value) if name.strip() == "q" else 1.0
        except ValueError:
            weight = 0.0
        yield coding.strip(), weight if 0.0 <= weight <= 1.0 else 0.0
