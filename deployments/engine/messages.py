"""What goes into an engine and what comes out: plain data, which crosses processes (`channel.py`)."""

from __future__ import annotations

import hashlib

import msgspec

from cluster.types import FinishReason, Priority, Sampling


class AdapterUse(msgspec.Struct, frozen=True, array_like=True):
    """The adapter that a request is answered with: the slot that every rank has it in (from 1), and the digest of its content."""

    slot: int
    digest: bytes


class Request(msgspec.Struct, frozen=True):
    """One prompt with `sampling.n` answers wanted. The caller has checked that prompt and output fit the context window."""

    id: int
    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    stop_ids: list[int]
    seed: int
    salt: bytes = b""
    tenant: bytes = b""  # opaque: whose share of the engine it takes
    priority: Priority = "interactive"
    adapter: AdapterUse | None = None

    @property
    def prefix_salt(self) -> bytes:
        """What the hashes of its KV blocks begin with: other adapters make other keys and values of the same tokens."""
        return self.salt if self.adapter is None else hashlib.sha256(self.salt + b"\0adapter\0" + self.adapter.digest).digest()


class Output(msgspec.Struct, array_like=True):
    """One sampled token of one choice, or none (-1) with the finish reason `error`. `cached` counts prompt tokens that the prefix
    cache gave, with the first output; `compute_us` is what the choice has cost so far, this step included."""

    request_id: int
    index: int
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    cached: int = 0
    compute_us: int = 0


class Stats(msgspec.Struct):
    """Counters since the start and gauges of now. Times in seconds."""

    steps: int = 0
    running: int = 0
    waiting: int = 0
    waiting_batch: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of the drafted ones, those that became output
    aborted: int = 0
    failed: int = 0  # choices that ended because no token could be chosen
    busy_s: float = 0.0
    model_s: float = 0.0  # of busy_s, the time inside the model
    attributed_s: float = 0.0  # of busy_s, what requests have got as theirs
    held_s: float = 0.0  # since the start
