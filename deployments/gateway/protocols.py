"""Which protocol a path belongs to: OpenAI's, or the Open Inference Protocol under /v2, which has another form of errors and allows
compressed bodies."""

from __future__ import annotations

OPEN_INFERENCE = "/v2"


def is_open_inference(path: str) -> bool:
    return path == OPEN_INFERENCE or path.startswith(OPEN_INFERENCE + "/")
