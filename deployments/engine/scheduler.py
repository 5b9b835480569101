"""Which tokens of which sequences are computed in the next step. Pure Python over numbers: no torch, no clock, no thread.

Iteration-level scheduling (Orca, OSDI 2022) over paged memory (PagedAttention, SOSP 2023) with chunked prefill (Sarathi-Serve,
OSDI 2024). A step is filled in this order:

    1. running sequences, oldest first: a decoder takes one token, an unfinished prompt takes a chunk of what the budget leaves
    2. waiting sequences, first come first served, as long as slots, budget and blocks for the whole prompt are there
    3. guessed tokens behind those of the decoders, if somebody guesses, from the budget and the blocks that nobody else took

When a running sequence needs a block and none is left, the newest running one is preempted: its blocks go back and it will be
recomputed, first in the queue. So the oldest always advances, which is why nothing starves: no sequence is accepted that could
not finish with the whole pool to itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

from deployments.engine.blocks import BlockPool, chain
from deployments.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens `start .. start + count` of one sequence, to be computed in this step, and the guesses that are tried behind them."""

    sequence: Sequence
    start: int
    count: int
    draft: tuple[int, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether the step ends at the sequence's last token, so that the next one is sampled."""
        return self.start + self.count == len(self.sequence.tokens)

    @property
    def width(self) -> int:
        """Rows of the step."""
        return self.count + len(self.draft)


class Scheduler:
    """Owns the queues and, through the pool, the blocks."""

    def __init__(self, pool: BlockPool, *, max_sequences: int, max_batch_tokens: int, prefix_cache: bool = True) -> None:
        self.pool = pool
        self.max_sequences = min(max_sequences, max_batch_tokens)  # a decoder must never lack a place in the budget
        self.max_batch_tokens = max_batch_tokens
        self.prefix_cache = prefix_cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens could ever run."""
        return self.pool.blocks_for(num_tokens) <= self.pool.num_blocks

    def add(self, sequence: Sequence) -> None:
        assert self.fits(sequence.num_prompt + sequence.max_tokens), "longer than the whole KV cache"
        self.waiting.append(sequence)

    def schedule(self) -> list[Slice]:
        """The next step: decoders first, shortest first (the order that attention groups them in). Empty only when there is nothing
        to do."""
        budget = self.max_batch_tokens - len(self.running)  # beyond the one token that every running sequence may take
        preemptions = self.num_preemptions
        slices: list[Slice] = []
        while len(slices) < len(self.running):  # `running` only ever loses its newest, which have no slice yet
            sequence = self.running[len(slices)]
            count = min(sequence.num_pending, budget + 1)
            if not self._make_room(sequence, count):
                break
            budget -= count - 1
            slices.append(Slice(sequence, sequence.num_computed, count))
        if self.num_preemptions == preemptions:
            self._admit(slices, budget)
        return _in_order(slices)

    def extend(self, slices: Items[Slice], drafts: Items[Items[int]]) -> Items[Slice]:
        """Let the slices that sample try these guesses too, as far as budget and blocks are left over: nobody waits or is preempted
        for a guess."""
        if not any(drafts):
            return slices
        budget = self.max_batch_tokens - sum(item.count for item in slices)
        extended = []
        for item, draft in zip(slices, drafts, strict=True):
            slots = (len(item.sequence.blocks) + self.pool.num_available) * self.pool.block_size - item.start - item.count
            tried = tuple(draft[: min(budget, slots)])
            self._grow(item.sequence, self._blocks_missing(item.sequence, item.count + len(tried)))
            budget -= len(tried)
            extended.append(replace(item, draft=tried))
        return _in_order(extended)

    def commit(self, slices: Iterable[Slice]) -> None:
        """The step was computed: its tokens are in the cache now, and full blocks may be shared."""
        for item in slices:
            sequence = item.sequence
            if sequence.blocks:  # not aborted meanwhile
                sequence.num_computed += item.count
                if self.prefix_cache:
                    self._seal(sequence)

    def accept(self, sequence: Sequence, count: int) -> None:
        """Of a committed slice's draft, so many tokens were right and have been appended. Blocks of the wrong ones go back."""
        sequence.num_computed += count
        while self._blocks_missing(sequence, 0) < 0:
            self.pool.release(sequence.blocks.pop())
        if self.prefix_cache:
            self._seal(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and give its blocks back. Safe to call twice."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def check_integrity(self) -> None:
        """The pool is sound, and every reference in it is a running sequence's."""
        self.pool.check_integrity()
        held = [block for sequence in self.running for block in sequence.blocks]
        assert self.pool.num_used == len(set(held)), "blocks are used that no running sequence holds"
        assert all(not sequence.blocks for sequence in self.waiting), "a waiting sequence holds blocks"

    def _admit(self, slices: list[Slice], budget: int) -> None:
        for sequence in tuple(self.waiting) if len(self.running) < self.max_sequences else ():
            if len(self.running) == self.max_sequences or budget <= 0:
                return
            if self._should_wait_for_leader(sequence):
                continue
            self._reuse_prefix(sequence)
            if self._blocks_missing(sequence, sequence.num_pending) > self.pool.num_available:
                self._release(sequence)
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            count = min(sequence.num_pending, budget)
            self._grow(sequence, self._blocks_missing(sequence, count))
            budget -= count
            slices.append(Slice(sequence, sequence.num_computed, count))

    def _should_wait_for_leader(self, sequence: Sequence) -> bool:
        leader = sequence.leader
        return self.prefix_cache and leader is not None and bool(leader.blocks) and leader.in_prompt

    def _reuse_prefix(self, sequence: Sequence) -> None:
        """Start behind the blocks that are cached already. The last token is always computed: its logits are wanted."""
        if not self.prefix_cache:
            return
        for position in range((len(sequence.tokens) - 1) // self.pool.block_size):
            block = self.pool.match(self._digest(sequence, position))
            if block is None:
                break
            sequence.blocks.append(block)
        sequence.num_sealed = len(sequence.blocks)
        sequence.num_computed = sequence.num_sealed * self.pool.block_size
        if not sequence.num_output:
            sequence.num_cached = sequence.num_computed

    def _seal(self, sequence: Sequence) -> None:
        while sequence.num_sealed < sequence.num_computed // self.pool.block_size:
            self.pool.seal(sequence.blocks[sequence.num_sealed], self._digest(sequence, sequence.num_sealed))
            sequence.num_sealed += 1

    def _digest(self, sequence: Sequence, position: int) -> bytes:
        """Of the full block at `position`; the ones before it are known already."""
        if position == len(sequence.digests):
            start = position * self.pool.block_size
            previous = sequence.digests[-1] if sequence.digests else sequence.salt
            sequence.digests.append(chain(previous, sequence.tokens[start : start + self.pool.block_size]))
        return sequence.digests[position]

    def _blocks_missing(self, sequence: Sequence, count: int) -> int:
        return self.pool.blocks_for(sequence.num_computed + count) - len(sequence.blocks)

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Grow a running sequence, preempting the newest as often as needed; False when that was the sequence itself."""
        missing = self._blocks_missing(sequence, count)
        while missing > self.pool.num_available:
            victim = self.running.pop()
            self._release(victim)
            self.waiting.appendleft(victim)
            self.num_preemptions += 1
            if victim is sequence:
                return False
        self._grow(sequence, missing)
        return True

    def _grow(self, sequence: Sequence, num_blocks: int) -> None:
        for _ in range(num_blocks):
            sequence.blocks.append(self.pool.allocate())

    def _release(self, sequence: Sequence) -> None:
        for block in reversed(sequence.blocks):  # the end of a prefix is reclaimed before its beginning
            self.pool.release(block)
        sequence.blocks.clear()
        sequence.num_computed = sequence.num_sealed = 0


def _in_order(slices: Iterable[Slice]) -> list[Slice]:
    return sorted(slices, key=lambda item: (item.width > 1, item.start))
