"""Which tokens of which sequences are computed in the next step. Pure Python over numbers: no torch, no clock, no thread.

Iteration-level scheduling (Orca, OSDI 2022) over paged memory (PagedAttention, SOSP 2023) with chunked prefill (Sarathi-Serve,
OSDI 2024), fair between tenants (`flows.py`). A step is filled in this order:

    1. every running sequence gets one token of the budget: decoders want no more
    2. waiting sequences get places as long as slots, budget and blocks for the whole prompt are there, in the order of their flows
    3. unfinished prompts share what is left of the budget, tenant by tenant
    4. guessed tokens behind those of the decoders, if somebody guesses, from the budget and the blocks that nobody else took

When a running sequence needs a block and none is left, another is preempted: its blocks go back, and it will be recomputed, first
in its flow. The victim is of class `batch`, unless that had less than its share; of the tenant that has had most; and the newest of
that tenant's. Whose turn it is may also displace running sequences of tenants that have had clearly more, and `interactive` those
of `batch` that run in places which nobody wanted, so that nobody waits for the end of another's long answers.

Nothing starves:

* No sequence is accepted that couldn't finish with the whole pool to itself, and the sequence that has run longest is never
  preempted. So in every step something advances for good, and one after the other finishes.
* Whoever waits in vain isn't charged, while those who are served are, and newcomers begin no lower. So after finitely many tokens
  of the others its flow is first in its class, and its class is first: from then on nothing enters before it, and nothing else
  than what has run longest can take its place away until it has computed a new token.
* Who waits for another to compute what both want (`following.py`) does so once, and for one that runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import count

from deployments.engine.blocks import BlockPool, chain
from deployments.engine.fairness import PROMPT, batch_part, shares
from deployments.engine.flows import Flow, Flows
from deployments.engine.following import common, pays
from deployments.engine.sequence import Sequence

MAX_SHARES = 8
"""Tenants whose prompts are computed at the same time beyond what one step could hold: more would all be slow together."""


@dataclass(slots=True, eq=False)  # not frozen: hundreds are made in every step
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

    def __init__(
        self, pool: BlockPool, *, max_sequences: int, max_batch_tokens: int, prefix_cache: bool = True, depth: int = 1
    ) -> None:
        self.pool = pool
        self.max_sequences = min(max_sequences, max_batch_tokens)  # a decoder must never lack a place in the budget
        self.max_batch_tokens = max_batch_tokens
        self.budget = max_batch_tokens  # tokens of the next step; never less than the running sequences need
        self.prefix_cache = prefix_cache
        self.depth = depth  # steps that may be under way at once, each with other sequences
        self.under_way: set[Sequence] = set()
        self.waiting = Flows()
        self.running: dict[Sequence, Flow] = {}  # by the time that they have run
        self.num_preemptions = 0
        self._arrivals = count()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def num_decoders(self) -> int:
        """Running sequences that take one token of the next step."""
        idle = sum(sequence.num_pending == 1 and sequence not in self.under_way for sequence in self.running)
        return min(idle, self._places)

    @property
    def num_newcomers(self) -> int:
        """Sequences whose prompt is under way, or could be at once."""
        entering = sum(sequence.in_prompt for sequence in self.running)
        return entering + min(len(self.waiting), self.max_sequences - len(self.running))

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens could ever run."""
        return self.pool.blocks_for(num_tokens) <= self.pool.num_blocks

    def add(self, sequence: Sequence) -> None:
        assert self.fits(sequence.num_prompt + sequence.max_tokens), "longer than the whole KV cache"
        sequence.arrival = next(self._arrivals)
        self.waiting.add(sequence)

    def schedule(self) -> list[Slice]:
        """The next step: decoders first, shortest first (the order that attention groups them in). Empty only when there is nothing
        to do, or nothing that isn't under way."""
        preemptions, places = self.num_preemptions, self._places
        counts: dict[Sequence, int] = {}  # tokens of this step
        for sequence in tuple(self.running):
            if len(counts) == places:
                break
            if sequence in self.running and sequence not in self.under_way and self._make_room(sequence, counts):
                counts[sequence] = 1
        if self.num_preemptions == preemptions:
            self._admit(counts)
        self._share(counts)
        return _in_order([Slice(sequence, sequence.num_computed, count) for sequence, count in counts.items()])

    @property
    def _places(self) -> int:
        """Running sequences that one step takes: all of them divided among the steps that may be under way."""
        return -(-len(self.running) // self.depth)

    def launch(self, slices: Iterable[Slice]) -> None:
        """The step was begun: until it is committed, its sequences are in no other and can't be preempted."""
        self.under_way.update(item.sequence for item in slices)

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
            self.under_way.discard(sequence)
            if sequence.blocks:  # not aborted meanwhile
                sequence.num_computed += item.count
                self._charge(sequence)
                if self.prefix_cache:
                    self._seal(sequence)

    def accept(self, sequence: Sequence, count: int) -> None:
        """Of a committed slice's draft, so many tokens were right and have been appended. Blocks of the wrong ones go back."""
        sequence.num_computed += count
        self._charge(sequence)
        while self._blocks_missing(sequence, 0) < 0:
            self.pool.release(sequence.blocks.pop())
        if self.prefix_cache:
            self._seal(sequence)

    def forget(self, sequence: Sequence) -> None:
        """What this sequence has in the cache can't be trusted: nobody gets a block of it any more. That includes what it found
        there itself: it may be the fault of an earlier sequence that left before its own logits were seen."""
        for block in sequence.blocks:
            self.pool.unseal(block)

    def forget_all(self) -> None:
        """The KV cache is empty. Running sequences go back to the front of their flows, so that the longest has its turn first."""
        for sequence in reversed(self.running.copy()):
            self._preempt(sequence, {})
        self.pool.forget()

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and give its blocks back. Safe to call twice."""
        if flow := self.running.pop(sequence, None):
            self.waiting.stop(flow)
        else:
            self.waiting.discard(sequence)
        self._release(sequence)

    def check_integrity(self) -> None:
        """The pool is sound, and every reference in it is a running sequence's."""
        self.pool.check_integrity()
        self.waiting.check_integrity(self.running.values())
        held = [block for sequence in self.running for block in sequence.blocks]
        assert self.pool.num_used == len(set(held)), "blocks are used that no running sequence holds"
        assert all(not sequence.blocks for sequence in self.waiting), "a waiting sequence holds blocks"

    def _admit(self, counts: dict[Sequence, int]) -> None:
        wanted = self._prompts(counts) if self.waiting else {}
        while turn := self._next_turn(len(counts), wanted):
            sequence, flow = turn
            if len(self.running) == self.max_sequences and not self._could_displace(sequence, flow):
                return
            self._reuse_prefix(sequence)
            if not self._fits_now(sequence) and not self._displace(sequence, flow, counts):
                self._release(sequence)
                return
            self._grow(sequence, self._blocks_missing(sequence, sequence.num_pending))
            self.waiting.start(sequence, flow)
            self.running[sequence] = flow
            counts[sequence] = 1
            wanted = self._prompts(counts)

    def _next_turn(self, num_running: int, wanted: dict[Flow, int]) -> tuple[Sequence, Flow] | None:
        """Who gets the next place. While prompts want more than this step has, that is only for tenants that have none under way:
        the others wait for their own, and `batch` for `interactive`."""
        is_full = num_running + sum(wanted.values()) >= self.budget
        for flow in self.waiting.turns():
            if is_full and (flow in wanted or len(wanted) >= MAX_SHARES or not self.waiting.is_entitled(flow)):
                continue
            for sequence in flow.waiting:
                if not self._should_follow(sequence):
                    return sequence, flow
        return None

    def _prompts(self, counts: Iterable[Sequence]) -> dict[Flow, int]:
        """What each flow's unfinished prompts want beyond a token each."""
        wanted: dict[Flow, int] = {}
        for sequence in counts:
            if (more := len(sequence.tokens) - sequence.num_computed - 1) > 0:
                flow = self.running[sequence]
                wanted[flow] = wanted.get(flow, 0) + more
        return wanted

    def _share(self, counts: dict[Sequence, int]) -> None:
        """Give what is left of the budget to unfinished prompts; of one flow's, to those that have run longest."""
        budget, wanted = max(0, self.budget - len(counts)), self._prompts(counts)
        interactive = {flow: num for flow, num in wanted.items() if flow.service is self.waiting.interactive}
        batch = {flow: num for flow, num in wanted.items() if flow not in interactive}
        part = batch_part(budget, sum(interactive.values()), sum(batch.values()))
        given = shares(budget - part, interactive) | shares(part, batch)
        for sequence in counts if wanted else ():
            if sequence.num_pending > 1:
                flow = self.running[sequence]
                more = min(sequence.num_pending - 1, given[flow])
                given[flow] -= more
                counts[sequence] += more

    def _should_follow(self, sequence: Sequence) -> bool:
        """Whether to wait for one that computes most of what this one would, until the cache has it. Only for one in its life, and
        that one has begun before: so nobody waits for ever."""
        if not self.prefix_cache or sequence.has_followed:
            return False
        if sequence.leader is None:
            sequence.leader, sequence.num_shared = self._leader(sequence)
        if sequence.leader in self.running and sequence.leader.num_sealed < sequence.num_shared:
            return True
        sequence.has_followed = sequence.leader is not None
        sequence.leader = None
        return False

    def _leader(self, sequence: Sequence) -> tuple[Sequence | None, int]:
        """Whom to follow, and until how many of its blocks are in the cache."""
        size = self.pool.block_size
        own: Items[bytes] | None = None
        for other in self.running:
            if not other.in_prompt or (other.priority, sequence.priority) == ("batch", "interactive"):
                continue
            own = own or self._digests(sequence, len(sequence.tokens) - 1)  # not where nobody computes a prompt
            num_shared = common(own, self._digests(other, len(other.tokens)))
            if pays((num_shared - other.num_sealed) * size, len(sequence.tokens) - other.num_sealed * size):
                return other, num_shared
        return None, 0

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

    def _digests(self, sequence: Sequence, num_tokens: int) -> Items[bytes]:
        """Of the full blocks among so many tokens."""
        num_blocks = num_tokens // self.pool.block_size
        for position in range(len(sequence.digests), num_blocks):
            self._digest(sequence, position)
        return sequence.digests[:num_blocks]

    def _digest(self, sequence: Sequence, position: int) -> bytes:
        """Of the full block at `position`; the ones before it are known already."""
        if position == len(sequence.digests):
            start = position * self.pool.block_size
            previous = sequence.digests[-1] if sequence.digests else sequence.salt
            sequence.digests.append(chain(previous, sequence.tokens[start : start + self.pool.block_size]))
        return sequence.digests[position]

    def _blocks_missing(self, sequence: Sequence, count: int) -> int:
        return self.pool.blocks_for(sequence.num_computed + count) - len(sequence.blocks)

    def _make_room(self, sequence: Sequence, counts: dict[Sequence, int]) -> bool:
        """Grow a running sequence by a token, preempting others as often as needed; False when it was itself preempted, or waits
        for a step under way whose sequences might go instead."""
        missing = self._blocks_missing(sequence, 1)
        while missing > self.pool.num_available:
            victim = next(iter(self._victims()), sequence)
            if victim is sequence and self.under_way:
                return False
            self._preempt(victim, counts)
            if victim is sequence:
                return False
        self._grow(sequence, missing)
        return True

    def _fits_now(self, sequence: Sequence) -> bool:
        missing = self._blocks_missing(sequence, sequence.num_pending)
        return len(self.running) < self.max_sequences and missing <= self.pool.num_available

    def _could_displace(self, sequence: Sequence, flow: Flow) -> bool:
        cost = self.waiting.price(sequence)
        others = {(other, running.is_guest) for running, other in self.running.items()}
        return any(self.waiting.may_displace(flow, cost, other, is_guest) for other, is_guest in others)

    def _displace(self, sequence: Sequence, flow: Flow, counts: dict[Sequence, int]) -> bool:
        """Preempt as many as it takes to fit `sequence` in; nobody, and False, when that is too many or not for this flow."""
        victims: list[Sequence] = []
        cost = self.waiting.price(sequence)
        blocks = self._blocks_missing(sequence, sequence.num_pending) - self.pool.num_available
        for victim in self._victims():
            if blocks <= 0 and len(self.running) - len(victims) < self.max_sequences:
                break
            cost += PROMPT * len(victim.tokens)  # to compute it again
            if not self.waiting.may_displace(flow, cost, self.running[victim], victim.is_guest):
                return False
            victims.append(victim)
            blocks -= self.pool.num_alone(victim.blocks)
        if blocks > 0 or len(self.running) - len(victims) == self.max_sequences:
            return False
        for victim in victims:
            self._preempt(victim, counts)
        return True

    def _victims(self) -> list[Sequence]:
        """Who may be preempted, in this order: everybody but the one that has run longest, and those in a step under way."""
        candidates = [sequence for sequence in list(self.running)[1:] if sequence not in self.under_way]
        return sorted(candidates, key=lambda sequence: self.waiting.claim(sequence, self.running[sequence]), reverse=True)

    def _preempt(self, victim: Sequence, counts: dict[Sequence, int]) -> None:
        counts.pop(victim, None)
        self._release(victim)
        self.waiting.put_back(victim, self.running.pop(victim))
        self.num_preemptions += 1

    def _charge(self, sequence: Sequence) -> None:
        if sequence.num_computed > sequence.num_paid:
            self.waiting.charge(sequence, self.running[sequence])

    def _grow(self, sequence: Sequence, num_blocks: int) -> None:
        for _ in range(num_blocks):
            sequence.blocks.append(self.pool.allocate())

    def _release(self, sequence: Sequence) -> None:
        for block in reversed(sequence.blocks):  # the end of a prefix is reclaimed before its beginning
            self.pool.release(block)
        del sequence.blocks[:]
        sequence.num_computed = sequence.num_sealed = 0


def _in_order(slices: Iterable[Slice]) -> list[Slice]:
    return sorted(slices, key=lambda item: (item.width > 1, item.start))
