"""Around a call's work, below every entrance: whether it may begin, what it may cost at most, and what it used when it ends.

In this order: the models of key and project, rate limits, the reservation against budgets, the answers that are kept, the model.
Each is let go in the opposite order, however the call ends.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from cluster import metrics
from cluster.errors import ModelNotFound, PlatformError, RateLimited
from cluster.tenancy.metered import Metered, Service
from cluster.types import Adapter, Deployment, Encode, Predict
from deployments.gateway.bounds import Asked, Bound, bound
from deployments.gateway.cache import Outcome
from deployments.gateway.entrance import Entrance
from deployments.gateway.exchange import Exchange
from deployments.gateway.openai import models
from deployments.gateway.scopes import permit_model
from deployments.models import Answers

_OF_TASK: dict[str, Service] = {"embed": "embeddings", "rerank": "rerank", "classify": "classify"}


@asynccontextmanager
async def admitted(
    entrance: Entrance, notes: Exchange, model: str, asked: Sequence[Asked], *, streams: bool = False
) -> AsyncIterator[Answers]:
    """The models, for one call that its limits and budgets allow. Raises RateLimited, BudgetExceeded, LedgerUnavailable, and
    ModelNotFound for what its key or project may not use."""
    try:
        permit_model(notes.principal, model)
        most = await _bound(entrance, model, asked)
        async with (
            _limited(entrance, notes, model, most, streams=streams),
            _metered(entrance, notes, model, most, asked),
        ):
            yield entrance.models if entrance.cache is None else entrance.cache.view(lambda outcome: _note(notes, outcome))
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


async def _bound(entrance: Entrance, model: str, asked: Sequence[Asked]) -> Bound:
    if not entrance.limits.counts_tokens and entrance.tenancy.metering is None:
        return Bound(0, 0, 0)  # nobody needs to know
    facts = await entrance.models.facts(model)
    return bound(asked, facts.room if facts else None)


@asynccontextmanager
async def _limited(entrance: Entrance, notes: Exchange, model: str, most: Bound, *, streams: bool) -> AsyncIterator[None]:
    assert notes.principal is not None, "authentication comes first"
    try:
        granted = await entrance.limits.admit(notes.principal, model, most.total, streams=streams)
    except RateLimited as error:
        metrics.RATE_LIMITED.inc()
        notes.headers |= error.headers
        raise
    notes.headers |= granted.headers
    unsaid = most.input  # counted for a prompt of which the model said nothing: who hangs up has had it read
    try:
        yield
        unsaid = 0
    except Exception:  # a failure before the first word costs nothing
        unsaid = unsaid if notes.spoken else 0
        raise
    finally:
        granted.settle(_tokens(notes, unsaid))


def _tokens(notes: Exchange, unsaid: int) -> int:
    if notes.usage is None:
        return (notes.prompt_tokens or unsaid) + notes.spoken
    return 0 if notes.usage.from_cache else notes.usage.total_tokens


@asynccontextmanager
async def _metered(entrance: Entrance, notes: Exchange, model: str, most: Bound, asked: Sequence[Asked]) -> AsyncIterator[None]:
    """Of one call what was said so far is made durable on the way. Of several, which the cache may answer in part, it isn't known
    before the end which price it has."""
    metering = entrance.tenancy.metering
    if metering is None:
        yield
        return
    assert notes.principal is not None, "authentication comes first"
    worst = Metered(
        input_tokens=most.input,
        output_tokens=most.output,
        replayed_tokens=most.total if entrance.cache else 0,
        compute_seconds=round(len(asked) * entrance.settings.max_stream_s * 1e6),
    )
    operation = _operation(asked[0])
    async with metering.request(notes.principal, notes.request_id, model, worst, operation, later=notes.on_end) as running:
        if len(asked) == 1:
            notes.on_words = lambda: running.used(notes.metered)
        try:
            yield
        except PlatformError:
            if not notes.spoken:
                running.outcome = "failed"  # refused, by whomever: nothing was given
            raise
        finally:
            running.metered = notes.metered
            if notes.finish_reason in ("length", "abort"):
                running.outcome = "length" if notes.finish_reason == "length" else "cancelled"


def _operation(asked: Asked) -> Service:
    if isinstance(asked, Predict):
        return "infer"
    return _OF_TASK[asked.task] if isinstance(asked, Encode) else "completions"


def _note(notes: Exchange, outcome: Outcome) -> None:
    """Of several parts the least lucky one is said."""
    order: tuple[Outcome, ...] = ("hit", "shared", "miss", "bypass")
    before = notes.headers.get("x-cache", "hit")
    notes.headers["x-cache"] = max(outcome, before, key=order.index)
