"""Whether a call fits the limits of its project, its model and its key; and what it used of them, once that is known.

A call is counted at once with all that it could take, its tokens at the worst case, and corrected when it ends. It is let in when
it fits every limit that covers it, else it takes nothing of any. A call whose worst case is more than a minute's tokens is let in
when all of them are free; what it uses beyond is owed, and paid before the next. Knows neither HTTP nor where the counts are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from cluster.errors import ModelNotFound, RateLimited
from cluster.tenancy.counts import Counts, Kind, Want
from cluster.tenancy.model_permissions import EVERYTHING, Permission
from cluster.tenancy.rate_limits import ANY, RateLimit
from cluster.tenancy.rules import KnownRules
from cluster.types import Principal

MAX_WAIT_S = 120.0
"""The official clients obey no longer Retry-After."""

_LEAST_WAIT_S = 0.001
_UNITS: dict[Kind, str] = {"requests": "requests per minute", "tokens": "tokens per minute", "streams": "streams at once"}


class Granted:
    """Leave for one call. Must be settled once, however the call ends."""

    def __init__(self, counts: Counts | None = None, wants: Sequence[Want] = ()) -> None:
        self._counts, self._wants = counts, wants
        self.headers: Mapping[str, str] = _headers(counts, wants) if counts else {}

    def settle(self, tokens: int) -> None:
        """The call has ended and used so many tokens. Later settlements change nothing."""
        wants, self._wants = self._wants, ()
        for want in wants:
            if self._counts is not None and want.kind != "requests":
                self._counts.give(want, want.units - (tokens if want.kind == "tokens" else 0))


class Limits(Protocol):
    @property
    def counts_tokens(self) -> bool:
        """Whether anybody needs to know how many tokens a call takes."""
        ...

    async def permission(self, principal: Principal) -> Permission:
        """Which models the caller's project may use."""
        ...

    async def admit(self, principal: Principal, model: str, tokens: int, *, streams: bool = False) -> Granted:
        """Let a call in that takes at most `tokens`. Raises RateLimited with `retry_after_s`, and ModelNotFound for a model that
        the project may not use."""
        ...


class Unlimited:
    """Nothing is configured and nothing is counted."""

    counts_tokens = False

    async def permission(self, principal: Principal) -> Permission:
        return EVERYTHING

    async def admit(self, principal: Principal, model: str, tokens: int, *, streams: bool = False) -> Granted:
        return Granted()


class CountedLimits:
    """Limits by the rules of each project."""

    counts_tokens = True

    def __init__(self, rules: KnownRules, counts: Counts) -> None:
        self._rules, self._counts = rules, counts

    async def permission(self, principal: Principal) -> Permission:
        return (await self._rules.of(principal.tenant)).permission

    async def admit(self, principal: Principal, model: str, tokens: int, *, streams: bool = False) -> Granted:
        rules = await self._rules.of(principal.tenant)
        if not rules.permission.permits(model):
            raise ModelNotFound(f"The model {model[:256]!r} does not exist.", param="model")
        wants = [want for limit in rules.covering(model, principal.key_id) for want in self._wants(limit, tokens, streams)]
        if not wants:
            return Granted()
        await self._counts.prepare(wants)
        wait, refusing = max(((self._counts.wait_us(want), want) for want in wants), key=lambda pair: pair[0])
        if wait:
            raise _refusal(self._counts, wants, refusing, wait)
        for want in wants:
            self._counts.spend(want)
        return Granted(self._counts, wants)

    def _wants(self, limit: RateLimit, tokens: int, streams: bool) -> list[Want]:
        asked: list[tuple[Kind, int | None, int]] = [("requests", limit.requests, 1), ("tokens", limit.tokens, tokens)]
        if streams:
            asked.append(("streams", limit.streams, 1))
        where = f"{limit.project}/{limit.model}/{limit.key_id}"
        return [
            Want(kind, f"{kind}:{where}", most, min(units, max(1, self._counts.burst(kind, most))))
            for kind, most, units in asked
            if most is not None
        ]


def _refusal(counts: Counts, wants: Sequence[Want], refusing: Want, wait_us: int) -> RateLimited:
    project, model, key_id = refusing.name.partition(":")[2].split("/")
    whose = [f"project {project}", f"model {model}" if model != ANY else "", f"key {key_id}" if key_id != ANY else ""]
    seconds = min(max(wait_us / 1e6, _LEAST_WAIT_S), MAX_WAIT_S)
    level = counts.level(refusing)
    error = RateLimited(
        f"Rate limit reached for {', '.join(filter(None, whose))} on {_UNITS[refusing.kind]}: limit {refusing.limit}, "
        f"left {level.remaining}, requested {refusing.units}. Please try again in {duration(round(seconds * 1e6))}.",
        retry_after_s=seconds,
    )
    error.headers = _headers(counts, wants)
    return error


def _headers(counts: Counts, wants: Sequence[Want]) -> dict[str, str]:
    """`x-ratelimit-*` of the limits with the least left, as the OpenAI API writes them."""
    headers: dict[str, str] = {}
    for kind in ("requests", "tokens"):
        levels = [(counts.level(want), want.limit) for want in wants if want.kind == kind]
        if levels:
            level, limit = min(levels, key=lambda found: found[0].remaining)
            headers |= {
                f"x-ratelimit-limit-{kind}": str(limit),
                f"x-ratelimit-remaining-{kind}": str(level.remaining),
                f"x-ratelimit-reset-{kind}": duration(level.reset_us),
            }
    return headers


def duration(us: int) -> str:
    """As the OpenAI API writes times: `6ms`, `1.5s`, `2m0s`, rounded up to a millisecond."""
    ms = -(-us // 1000)
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    seconds = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{minutes}m{seconds}" if minutes else seconds
