"""The loop's body on rank 0: schedule, guess, run, sample, deliver. No thread, no socket, no text; one call of `step` is one step.

`execute` takes a Batch and returns the logits of its sampled rows; it is the only door to the model, so that a test can put
anything behind it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import msgspec

from cluster.settings import EngineSettings
from cluster.types import Constraint, FinishReason, Priority, Sampling
from deployments.engine.batch import Batch
from deployments.engine.blocks import BlockPool
from deployments.engine.chunking import Chunking
from deployments.engine.scheduler import Scheduler, Slice
from deployments.engine.sequence import Sequence
from deployments.engine.speculation import Speculation
from deployments.engine.structured import Grammars

if TYPE_CHECKING:
    from torch import Tensor

    from deployments.engine.sampler import Sampled
    from deployments.engine.structured import Allowed, Matcher

Execute = Callable[[Batch], "Tensor"]

NO_TOKEN = -1
"""In the place of a token that couldn't be chosen: the output says no more than that its choice ends with an error."""


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


class Output(msgspec.Struct, frozen=True, array_like=True):
    """One sampled token of one choice. `cached` counts prompt tokens that the prefix cache gave, with the first token."""

    request_id: int
    index: int
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    cached: int = 0


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
    busy_s: float = 0.0
    model_s: float = 0.0  # of busy_s, the time inside the model


@dataclass(slots=True)
class Engine:
    """Owns the scheduler and every request in it."""

    execute: Execute
    scheduler: Scheduler
    chunking: Chunking
    speculation: Speculation | None = None
    grammars: Grammars | None = None
    clock: Callable[[], float] = time.perf_counter
    _requests: dict[int, list[Sequence]] = field(default_factory=dict)  # the unfinished choices of each request
    _counts: Stats = field(default_factory=Stats)  # gauges stay zero here: `stats` reads them where they live

    @classmethod
    def of(cls, execute: Execute, num_blocks: int, settings: EngineSettings, grammars: Grammars | None = None) -> Engine:
        scheduler = Scheduler(
            BlockPool(num_blocks, settings.block_size),
            max_sequences=settings.max_sequences,
            max_batch_tokens=settings.max_batch_tokens,
            prefix_cache=settings.prefix_cache,
        )
        speculation = Speculation(settings.speculation) if settings.speculation else None
        return cls(execute, scheduler, Chunking(settings.max_batch_tokens, settings.step_target_ms / 1e3), speculation, grammars)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        leader: Sequence | None = None
        sequences = self._requests[request.id] = []
        for index in range(request.sampling.n):
            sequence = Sequence(
                request_id=request.id,
                index=index,
                tokens=list(request.prompt),
                num_prompt=len(request.prompt),
                sampling=request.sampling,
                max_tokens=request.max_tokens,
                stop_ids=frozenset(request.stop_ids),
                seed=choice_seed(request.seed, index),
                salt=request.salt,
                tenant=request.tenant,
                priority=request.priority,
                leader=leader,
                matcher=self._matcher(request.sampling.constraint),
            )
            leader = leader or sequence
            sequences.append(sequence)
            self.scheduler.add(sequence)

    def _matcher(self, constraint: Constraint | None) -> Matcher | None:
        if constraint is None:
            return None
        assert self.grammars, "an engine without grammars was asked for an answer of a certain form"
        return self.grammars.matcher(constraint)

    def abort(self, request_id: int, index: int | None = None) -> None:
        """Stop one choice of a request, or all. Its blocks are free when this returns; unknown requests are long finished."""
        for sequence in tuple(self._requests.get(request_id, ())):
            if index is None or sequence.index == index:
                self._counts.aborted += 1
                self._finish(sequence)

    def step(self) -> list[Output]:
        """Compute one step and return its tokens: one for each sequence that samples, and its guesses that were right."""
        began = self.clock()
        self.scheduler.budget = self.chunking.budget(self.scheduler.num_decoders)
        slices: Items[Slice] = self.scheduler.schedule()
        if not slices:
            return []
        if self.speculation:
            drafts = [self._guesses(*pair) for pair in zip(slices, self.speculation.drafts(slices), strict=True)]
            slices = self.scheduler.extend(slices, drafts)
        batch = Batch.of(slices)
        model_began = self.clock()
        logits = self.execute(batch)
        self._counts.model_s += self.clock() - model_began
        self.scheduler.commit(slices)
        outputs = self._deliver([item for item in slices if item.samples], logits)
        seconds = self.clock() - began
        self._counts.steps += 1
        self._counts.busy_s += seconds
        self.chunking.learn(*_composition(slices), seconds)
        if self.speculation:
            self.speculation.learn(slices, seconds)
        return outputs

    def stats(self) -> Stats:
        scheduler, pool = self.scheduler, self.scheduler.pool
        return msgspec.structs.replace(
            self._counts,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            waiting_batch=scheduler.waiting.batch.num_waiting,
            preemptions=scheduler.num_preemptions,
            blocks_total=pool.num_blocks,
            blocks_used=pool.num_used,
            blocks_cached=pool.num_cached,
        )

    def _deliver(self, slices: Items[Slice], logits: Tensor) -> list[Output]:
        """Sample in rounds: round j draws from the j-th row of every slice whose first j guesses were right. So a row is sampled
        with the sequence as it would be without guessing, and the noise being a function of seed and place, gives that token."""
        if not slices:
            return []
        from deployments.engine.sampler import sample

        outputs = []
        rows = accumulate((1 + len(item.draft) for item in slices[:-1]), initial=0)
        going, place = list(zip(slices, rows, strict=True)), 0
        while going:
            wanted = logits if len(going) == len(logits) else logits[[row + place for _, row in going]]
            sequences = [item.sequence for item, _ in going]
            chosen = sample(wanted, sequences, self._allowed(sequences, wanted.shape[1]))
            outputs += [self._take(item.sequence, token) for (item, _), token in zip(going, chosen, strict=True)]
            going = [(item, row) for item, row in going if self._goes_on(item, place)]
            place += 1
        return outputs

    def _allowed(self, sequences: Items[Sequence], width: int) -> dict[int, Allowed]:
        """By row, which tokens the grammars of constrained sequences let follow."""
        matchers = {row: sequence.matcher for row, sequence in enumerate(sequences) if sequence.matcher}
        if not matchers or not self.grammars:
            return {}
        allowed = self.grammars.allowed(list(matchers.values()), width)
        return {row: allowed[place] for place, (row, matcher) in enumerate(matchers.items()) if not matcher.has_failed}

    def _guesses(self, item: Slice, draft: list[int]) -> list[int]:
        """What a grammar forces is a guess that can't be wrong; else the guesses up to the first that it forbids."""
        matcher = item.sequence.matcher
        if matcher is None or not item.samples or item.count > 1 or self.speculation is None:
            return draft
        return matcher.forced(self.speculation.room(item)) or draft[: matcher.fitting(draft)]

    def _take(self, sequence: Sequence, sampled: Sampled) -> Output:
        if sequence.matcher and sequence.matcher.has_failed:
            sequence.finish_reason = "error"
            return Output(sequence.request_id, sequence.index, NO_TOKEN, finish_reason="error")
        first = sequence.num_output == 0
        sequence.append(sampled.token)
        cached = sequence.num_cached if first else 0
        self._counts.output_tokens += 1
        if first:
            self._counts.prompt_tokens += sequence.num_prompt
            self._counts.cached_tokens += cached
        return Output(
            sequence.request_id,
            sequence.index,
            sampled.token,
            sampled.logprob,
            sampled.top,
            sequence.finish_reason,
            cached,
        )

    def _goes_on(self, item: Slice, place: int) -> bool:
        """Whether the token that was just taken is the guess at `place`, so that the next row counts; else the slice is done."""
        sequence = item.sequence
        if place < len(item.draft) and item.draft[place] == sequence.tokens[-1] and not sequence.finish_reason:
            return True
        if item.draft:
            self.scheduler.accept(sequence, place)
            self._counts.drafted_tokens += len(item.draft)
            self._counts.accepted_tokens += place
        if sequence.finish_reason:
            self._finish(sequence)
        return False

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        sequences = self._requests[sequence.request_id]
        sequences.remove(sequence)
        if not sequences:
            del self._requests[sequence.request_id]


def _composition(slices: Items[Slice]) -> tuple[int, int]:
    """Decoders, and tokens of prompts."""
    decoders = sum(item.count == 1 for item in slices)
    return decoders, sum(item.count for item in slices) - decoders


def choice_seed(seed: int, index: int) -> int:
    """64 bits for choice `index` of a request, so that the choices of one seed differ and are always the same."""
    digest = hashlib.blake2b(seed.to_bytes(9, "little", signed=True) + index.to_bytes(4, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
