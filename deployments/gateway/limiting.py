"""Around a call's work: what it may cost at most, whether it may begin, and what it has used when it ends.

The bound of a text's tokens is its bytes: no tokenizer that models here have makes more of it, and none is known here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from cluster import metrics
from cluster.errors import ModelNotFound, RateLimited
from cluster.tenancy.limits import Granted
from cluster.types import Adapter, Deployment, Encode, Generate, Predict
from deployments.gateway.cache import Outcome
from deployments.gateway.entrance import Entrance
from deployments.gateway.exchange import Exchange
from deployments.gateway.openai import models
from deployments.gateway.scopes import permit_model
from deployments.router import Answers

TURN = 16
"""Tokens that a chat template may add to one message, and to a chat."""

UNKNOWN_ROOM = 8192
"""Context window of a model that doesn't tell its own."""


@asynccontextmanager
async def admitted(
    entrance: Entrance, notes: Exchange, model: str, asked: Sequence[Generate | Encode | Predict], *, streams: bool = False
) -> AsyncIterator[Answers]:
    """The models, for one call that its limits allow. Raises RateLimited, and ModelNotFound for what its key or project may not
    use."""
    try:
        permit_model(notes.principal, model)
        granted = await _admit(entrance, notes, model, asked, streams)
        used = sum(map(prompt_bound, asked))
        try:
            yield entrance.models if entrance.cache is None else entrance.cache.view(lambda outcome: _note(notes, outcome))
            used = 0
        except Exception:  # a failure before the first word costs nothing; who hangs up has had the prompt read
            used = used if notes.spoken else 0
            raise
        finally:
            granted.settle(_used(notes, used))
    except ModelNotFound:
        models.find(*await permitted(entrance, notes), model)  # says what there is, for this project
        raise


async def permitted(entrance: Entrance, notes: Exchange) -> tuple[Sequence[Deployment], Sequence[Adapter]]:
    """The served models and adapters that the caller's project may use."""
    served, adapters = await entrance.models.list(), await entrance.models.adapters()
    if notes.principal is None:
        return [], []
    of_project, of_key = (await entrance.limits.permission(notes.principal)).permits, notes.principal.may_call

    def may(model: str) -> bool:
        return of_project(model) and of_key(model)

    return [one for one in served if may(one.name)], [one for one in adapters if may(one.model)]


async def _admit(
    entrance: Entrance, notes: Exchange, model: str, asked: Sequence[Generate | Encode | Predict], streams: bool
) -> Granted:
    assert notes.principal is not None, "authentication comes first"
    tokens = 0
    if entrance.limits.counts_tokens:
        facts = await entrance.models.facts(model)
        room = facts.room if facts else None
        tokens = sum(worst_case(request, room or UNKNOWN_ROOM) for request in asked)
    try:
        granted = await entrance.limits.admit(notes.principal, model, tokens, streams=streams)
    except RateLimited as error:
        metrics.RATE_LIMITED.inc()
        notes.headers |= error.headers
        raise
    notes.headers |= granted.headers
    return granted


def worst_case(request: Generate | Encode | Predict, room: int) -> int:
    """Tokens that a call takes at most: its prompt once, its output for every choice, each choice within the context window."""
    prompt = prompt_bound(request)
    if not isinstance(request, Generate):
        return prompt
    sampling = request.sampling
    output = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
    return min(min(prompt, room) + sampling.n * output, room + (sampling.n - 1) * output)


def prompt_bound(request: Generate | Encode | Predict) -> int:
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


def _used(notes: Exchange, prompt: int) -> int:
    """`prompt`: what to count for it when the model didn't say."""
    if notes.usage is None:
        return prompt + notes.spoken
    return 0 if notes.usage.from_cache else notes.usage.total_tokens


def _note(notes: Exchange, outcome: Outcome) -> None:
    """Of several parts the least lucky one is said."""
    order: tuple[Outcome, ...] = ("hit", "shared", "miss", "bypass")
    before = notes.headers.get("x-cache", "hit")
    notes.headers["x-cache"] = max(outcome, before, key=order.index)
