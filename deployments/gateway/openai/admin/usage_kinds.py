"""What usage and costs look like on the wire: the official kinds of usage, and ours. Pure translation.

Of images, audio and the like there is no usage on this platform. `reranks`, `classifications` and `inferences` are ours: with
`completions` and `embeddings` they are all that the ledger knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.tenancy import money
from cluster.tenancy.metered import METERS, Service
from cluster.tenancy.usage_report import By, Cost, Sum

USUAL = ("project_id", "user_id", "api_key_id", "model")
COST_GROUPS = ("project_id", "user_id", "line_item", "api_key_id")
OURS: Mapping[str, By] = {
    "project_id": "project",
    "user_id": "user_id",
    "api_key_id": "key_id",
    "model": "model",
    "line_item": "line",
}
UNITS = {"Tokens": "tokens", "Seconds": "duration_seconds", "Requests": "requests"}

Shown = dict[str, Any]


def _completions(of: Sum) -> Shown:
    used = of.metered
    return {
        "input_tokens": used.input_tokens + used.cached_tokens,
        "input_cached_tokens": used.cached_tokens,
        "input_uncached_tokens": used.input_tokens,
        "output_tokens": used.output_tokens,
        "input_text_tokens": used.input_tokens,
        "output_text_tokens": used.output_tokens,
        "input_cached_text_tokens": used.cached_tokens,
        **_ours(of),
    }


def _encoded(of: Sum) -> Shown:
    return {"input_tokens": of.metered.input_tokens + of.metered.cached_tokens, **_ours(of)}


def _ours(of: Sum) -> Shown:
    """Beyond the official fields: tokens that the response cache answered, and time of the model."""
    used = of.metered
    more = {"replayed_tokens": used.replayed_tokens, "compute_seconds": used.compute_seconds / 1e6}
    return {"num_model_requests": used.requests, **more}


@dataclass(frozen=True, slots=True)
class Kind:
    """One page of usage. Without an operation there is nothing on it. `more_groups`: those that have one value here."""

    path: str
    object: str
    operation: Service | None = None
    shown: Callable[[Sum], Shown] = _ours
    more_groups: Mapping[str, bool | None] | None = None
    groups: Sequence[str] = USUAL

    def result(self, of: Sum, asked: Sequence[str]) -> Shown:
        own = {name: of.group.get(OURS[name]) for name in self.groups}
        more = {name: value if name in asked else None for name, value in (self.more_groups or {}).items()}
        return {"object": f"organization.usage.{self.object}.result", **self.shown(of), **own, **more}


_TIERS = {"batch": False, "service_tier": None}
KINDS = (
    Kind("completions", "completions", "completions", _completions, _TIERS),
    Kind("embeddings", "embeddings", "embeddings", _encoded),
    Kind("reranks", "reranks", "rerank", _encoded),
    Kind("classifications", "classifications", "classify", _encoded),
    Kind("inferences", "inferences", "infer"),
    Kind("moderations", "moderations"),
    Kind("images", "images", more_groups={"size": None, "source": None}),
    Kind("audio_speeches", "audio_speeches"),
    Kind("audio_transcriptions", "audio_transcriptions"),
    Kind("vector_stores", "vector_stores", groups=("project_id",)),
    Kind("code_interpreter_sessions", "code_interpreter_sessions", groups=("project_id",)),
    Kind("file_search_calls", "file_searches", more_groups={"vector_store_id": None}, groups=USUAL[:3]),
    Kind("web_search_calls", "web_searches", more_groups={"context_level": None}),
    Kind("decisions", "decisions", more_groups={**_TIERS, "api_source": None}),
)


def cost(found: Cost, currency: str) -> Shown:
    """A number of at most 15 digits, so that rounding it to a millionth gives the ledger's amount again."""
    line = found.group.get("line")
    quantity, unit = None, None
    if line is not None and found.quantity is not None:
        meter = METERS[line.rpartition(", ")[2]]
        quantity, unit = found.quantity / meter.scale, UNITS.get(meter.unit)
    return {
        "object": "organization.costs.result",
        "amount": {"value": float(money.decimal(found.amount)), "currency": currency},
        "quantity": quantity,
        "quantity_unit": unit,
        **{name: found.group.get(OURS[name]) for name in COST_GROUPS},
    }
