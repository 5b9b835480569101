"""Server-sent events (WHATWG HTML, section 9.2) as the official OpenAI clients read them.

One `data:` line of JSON for a chunk, `data: [DONE]` after a whole answer, one `data: {"error": …}` and nothing more after a broken
one, comments while there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from cluster.errors import PlatformError
from deployments.gateway import errors

CONTENT_TYPE = b"text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keepalive\n\n"

_encoder = msgspec.json.Encoder()


def frames(chunks: Iterable[Mapping[str, Any]]) -> bytes:
    """Any number of chunks as the bytes of one write. JSON never holds a raw line break, so one chunk is one line."""
    return b"".join([b"data: %b\n\n" % _encoder.encode(chunk) for chunk in chunks])


def error(problem: PlatformError) -> bytes:
    return b"data: %b\n\n" % errors.encode(problem)
