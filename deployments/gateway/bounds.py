"""What a call may take at most, before any tokenizer has seen it.

The bound of a text's tokens is its bytes: no tokenizer that models here have makes more of it, and none is known here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.types import Encode, Generate, Predict

Asked = Generate | Encode | Predict

TURN = 16
"""Tokens that a chat template may add to one message, and to a chat."""

UNKNOWN_ROOM = 8192
"""Context window of a model that doesn't tell its own."""


@dataclass(frozen=True, slots=True)
class Bound:
    """Tokens that nothing passes: those of the prompts, those of all answers, and both together, which is less than their sum where
    prompt and answer share one context window."""

    input: int
    output: int
    total: int


def bound(asked: Iterable[Asked], room: int | None) -> Bound:
    """Of the calls of one request to a model with a context window of `room` tokens."""
    each = [_bound(request, room or UNKNOWN_ROOM) for request in asked]
    return Bound(sum(one.input for one in each), sum(one.output for one in each), sum(one.total for one in each))


def _bound(request: Asked, room: int) -> Bound:
    prompt = prompt_bound(request)
    if not isinstance(request, Generate):
        return Bound(prompt, 0, prompt)
    sampling = request.sampling
    output = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
    prompt = min(prompt, room)
    return Bound(prompt, sampling.n * output, min(prompt + sampling.n * output, room + (sampling.n - 1) * output))


def prompt_bound(request: Asked) -> int:
    if isinstance(request, Predict):
        return 0
    if isinstance(request, Encode):
        query = _bytes(request.query or "") + TURN
        return sum(_bytes(text) + query for text in request.texts) + sum(len(ids) + TURN for ids in request.ids)
    if request.prompt_ids is not None:
        return len(request.prompt_ids) + 1
    if request.prompt is not None:
        return _bytes(request.prompt) + 1
    turns = sum(
        _bytes(turn.content) + sum(_bytes(call.arguments) + TURN for call in turn.tool_calls) + TURN for turn in request.messages
    )
    tools = sum(_bytes(tool.parameters) + _bytes(tool.description or "") + TURN for tool in request.tools)
    return turns + tools + TURN


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
