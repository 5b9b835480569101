"""The loop's body on rank 0: schedule, guess, run, sample, deliver. No thread, no socket, no text; one call of `step` is one step.

`execute` takes a Batch and returns the logits of its sampled rows; it is the only door to the model, so that a test can put
anything behind it. Where the model has several stages, as many steps are under way at once, each with other sequences: `launch`
lets the first stages begin with a step that `execute` finishes later.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import msgspec

from cluster.settings import EngineSettings
from cluster.tenancy.attribution import MICROSECONDS, ComputeMeter
from cluster.types import Constraint
from deployments.engine.batch import Batch
from deployments.engine.blocks import BlockPool
from deployments.engine.chunking import Chunking
from deployments.engine.messages import Output, Request, Stats
from deployments.engine.scheduler import Scheduler, Slice
from deployments.engine.sequence import NO_TOKEN, Sequence
from deployments.engine.speculation import Speculation
from deployments.engine.structured import Grammars

if TYPE_CHECKING:
    from torch import Tensor

    from deployments.engine.sampler import Sampled, Sampler
    from deployments.engine.structured import Allowed, Matcher

Execute = Callable[[Batch], "Tensor"]
Launch = Callable[[Batch], None]


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched."""

    slices: Items[Slice]
    batch: Batch


@dataclass(slots=True)
class Engine:
    """Owns the scheduler and every request in it."""

    execute: Execute
    scheduler: Scheduler
    chunking: Chunking
    speculation: Speculation | None = None
    sampler: Sampler | None = None  # None: the readable one
    grammars: Grammars | None = None
    clock: Callable[[], float] = time.perf_counter
    launch: Launch = lambda batch: None
    _flights: deque[Flight] = field(default_factory=deque)  # the oldest first
    _requests: dict[int, list[Sequence]] = field(default_factory=dict)  # the unfinished choices of each request
    _counts: Stats = field(default_factory=Stats)  # gauges stay zero here: `stats` reads them where they live
    _meter: ComputeMeter = field(default_factory=ComputeMeter)
    _spoke: list[Sequence] = field(default_factory=list)  # in the step that lands: whose outputs they are
    _began: float = field(init=False)

    def __post_init__(self) -> None:
        self._began = self.clock()

    @classmethod
    def of(
        cls,
        execute: Execute,
        num_blocks: int,
        settings: EngineSettings,
        *,
        sampler: Sampler | None = None,
        grammars: Grammars | None = None,
        launch: Launch = lambda batch: None,
        depth: int = 1,
    ) -> Engine:
        """`depth`: steps that may be under way at once."""
        scheduler = Scheduler(
            BlockPool(num_blocks, settings.block_size),
            max_sequences=settings.max_sequences,
            max_batch_tokens=settings.max_batch_tokens,
            prefix_cache=settings.prefix_cache,
            depth=depth,
        )
        speculation = Speculation(settings.speculation) if settings.speculation else None
        chunking = Chunking(settings.max_batch_tokens, settings.step_target_ms / 1e3 / depth)  # who reads waits for all of them
        return cls(execute, scheduler, chunking, speculation, sampler, grammars, launch=launch)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._flights)

    def add(self, request: Request) -> None:
        salt, slot = request.prefix_salt, request.adapter.slot if request.adapter else 0
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
                salt=salt,
                tenant=request.tenant,
                adapter=slot,
                priority=request.priority,
                matcher=self._matcher(request.sampling.constraint),
            )
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

    def forget(self) -> None:
        """Keys and values of all sequences are gone: whoever runs will be computed again, and no prefix is known."""
        self.scheduler.forget_all()

    def step(self) -> list[Output]:
        """Compute one step and return its tokens: one for each sequence that samples, and its guesses that were right. Before it
        waits for the oldest step, it launches as many as may be under way."""
        began = self.clock()
        while len(self._flights) < self.scheduler.depth and self._launch():
            pass
        return self._land(began) if self._flights else []

    def drain(self) -> list[Output]:
        """Finish the steps that are under way, and begin no other."""
        outputs = []
        while self._flights:
            outputs += self._land(self.clock())
        return outputs

    def _launch(self) -> bool:
        """False when there is nothing to do, or nothing that isn't under way."""
        self.scheduler.budget = self.chunking.budget(self.scheduler.num_decoders, self.scheduler.num_newcomers)
        slices: Items[Slice] = self.scheduler.schedule()
        if not slices:
            return False
        if self.speculation:
            slices = self.scheduler.extend(slices, self.speculation.drafts(slices))
        self.scheduler.launch(slices)
        flight = Flight(slices, Batch.of(slices))
        self.launch(flight.batch)
        self._flights.append(flight)
        return True

    def _land(self, began: float) -> list[Output]:
        flight = self._flights.popleft()
        slices = flight.slices
        model_began = self.clock()
        logits = self.execute(flight.batch)
        self._counts.model_s += self.clock() - model_began
        self.scheduler.commit(slices)
        outputs = self._deliver([item for item in slices if item.samples], logits)
        seconds = self.clock() - began
        self._counts.steps += 1
        self._counts.busy_s += seconds
        self._attribute(flight, seconds, outputs)
        self.chunking.learn(*_composition(slices), seconds)
        if self.speculation:
            self.speculation.learn(slices, seconds)
        return outputs

    def _attribute(self, flight: Flight, seconds: float, outputs: list[Output]) -> None:
        """Split the step's time over everybody in it, those who have left meanwhile too, and say with the outputs what it has come
        to."""
        shares = self._meter.step(seconds, flight.batch.counts.tolist())
        for item, share in zip(flight.slices, shares, strict=True):
            item.sequence.compute_us += share
        for output, sequence in zip(outputs, self._spoke, strict=True):
            output.compute_us = sequence.compute_us
        self._spoke.clear()

    def uses(self, slot: int) -> bool:
        """Whether an unfinished sequence, running or waiting, has the adapter in this slot."""
        return any(sequence.adapter == slot for sequences in self._requests.values() for sequence in sequences)

    def stats(self) -> Stats:
        scheduler, pool = self.scheduler, self.scheduler.pool
        return msgspec.structs.replace(
            self._counts,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            waiting_batch=scheduler.waiting.batch.num_waiting,
            preemptions=scheduler.num_preemptions,
            attributed_s=self._meter.attributed / MICROSECONDS,
            held_s=self.clock() - self._began,
            blocks_total=pool.num_blocks,
            blocks_used=pool.num_used,
            blocks_cached=pool.num_cached,
        )

    def _deliver(self, slices: Items[Slice], logits: Tensor) -> list[Output]:
        """Sample in rounds: round j draws from the j-th row of every slice whose first j guesses were right. So a row is sampled
        with the sequence as it would be without guessing, and the noise being a function of seed and place, gives that token."""
        if not slices:
            return []
        from deployments.engine.sampler import READABLE, rows_of, sample

        outputs = []
        rows = accumulate((1 + len(item.draft) for item in slices[:-1]), initial=0)
        going, place = [pair for pair in zip(slices, rows, strict=True) if pair[0].sequence in self.scheduler.running], 0
        while going:
            wanted = logits if len(going) == len(logits) else rows_of(logits, [row + place for _, row in going])
            sequences = [item.sequence for item, _ in going]
            chosen = sample(wanted, sequences, self.sampler or READABLE, self._allowed(sequences, wanted.shape[1]))
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

    def _take(self, sequence: Sequence, sampled: Sampled) -> Output:
        self._spoke.append(sequence)
        cached = 0
        if sequence.num_output == 0:
            cached = sequence.num_cached
            self._counts.prompt_tokens += sequence.num_prompt
            self._counts.cached_tokens += cached
        if sampled.token == NO_TOKEN or (sequence.matcher and sequence.matcher.has_failed):
            sequence.finish_reason = "error"
            self._counts.failed += 1
            return Output(sequence.request_id, sequence.index, NO_TOKEN, finish_reason="error", cached=cached)
        sequence.append(sampled.token)
        self._counts.output_tokens += 1
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
        if sequence.finish_reason == "error":
            self.scheduler.forget(sequence)
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
