"""One sequence of tokens on its way through the engine: all state that belongs to it, and nothing else's."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.types import FinishReason, Priority, Sampling
from deployments.engine.draft import Drafter

if TYPE_CHECKING:
    from deployments.engine.forced import ForcedDrafter
    from deployments.engine.structured import Matcher

NO_TOKEN = -1
"""In the place of a token that couldn't be chosen: the output says no more than that its choice ends with an error."""


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` = prompt + output. The KV cache holds the first `num_computed` of them, in `blocks` in order.

    |<- num_prompt ->|<- output ->|
    |<- num_computed ->|<- pending ->|
    """

    request_id: int
    index: int  # which of the request's n choices
    tokens: list[int]
    num_prompt: int
    sampling: Sampling
    max_tokens: int  # length of the output at most
    stop_ids: frozenset[int]
    seed: int
    salt: bytes = b""
    tenant: bytes = b""  # opaque
    adapter: int = 0  # the slot that it is in; 0: none
    priority: Priority = "interactive"
    arrival: int = 0  # its number in the scheduler
    is_guest: bool = False  # runs in a place that nobody with a better claim wanted
    leader: Sequence | None = None  # computes what this one waits for: its first `num_shared` blocks
    num_shared: int = 0
    has_followed: bool = False  # has waited for a leader, and won't again
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens that were found in the prefix cache
    num_paid: int = 0  # tokens that its tenant was charged for
    compute_us: int = 0  # of all steps that it was in, the time that was for it
    blocks: array[int] = field(default_factory=lambda: array("i"))
    num_sealed: int = 0  # blocks whose content the pool knows
    digests: list[bytes] = field(default_factory=list)  # of the full blocks' tokens, as far as known
    drafter: Drafter | ForcedDrafter | None = None  # since it decodes, where guessing is on
    matcher: Matcher | None = None  # where it is in its grammar, if its answer must have a form
    finish_reason: FinishReason | None = None

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def in_prompt(self) -> bool:
        """Whether part of the prompt is still to be computed."""
        return self.num_computed < self.num_prompt

    def append(self, token: int) -> None:
        """Take a sampled token and notice whether it is the last. Stop strings are the detokeniser's business."""
        self.tokens.append(token)
        if token in self.stop_ids and self.num_output > self.sampling.min_tokens:
            self.finish_reason = "stop"
        elif self.num_output >= self.max_tokens:
            self.finish_reason = "length"
        if self.matcher:
            self._advance(self.matcher, token)

    def _advance(self, matcher: Matcher, token: int) -> None:
        """A finished grammar ends the answer, whatever else was asked for: nothing can follow."""
        if self.finish_reason != "stop":  # a token that stops is none of the answer's
            matcher.take(token)
        if matcher.has_failed:
            self.finish_reason = "error"
        elif matcher.is_finished:
            self.finish_reason = "stop"
