"""How many guessed tokens each sequence tries in a step. A policy over numbers: it sees slices and seconds, never a model.

Verifying a guess is one more row in the forward pass (speculative decoding: Leviathan 2023, Chen 2023). At one sequence a step
is bound by reading the weights and a row is almost free; at many it is bound by arithmetic and a wrong row is a loss. Both
numbers that decide are measured while the engine serves:

    chance   that a guess is right: every drafter keeps score of its own guesses, also of those that nobody tried
    price    of one guessed row, as a share of a plain step with as many decoders: from the times of steps with and without

A step tries the guesses that make the most tokens per time, and none when none does. What a price was measured from is
forgotten after a while, so that a wrong price, or a grown context, is found out.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from statistics import median

from deployments.engine.draft import SURE, Drafter, Experience
from deployments.engine.forced import ForcedDrafter, Habit
from deployments.engine.scheduler import Slice

ENOUGH = 5
"""Steps of a kind that must have been timed before their times count."""
NEWEST = 16
"""Steps without guesses that an estimate is made of at most."""
TRIED = 64
"""Steps with guesses, likewise."""
MEMORY = 1000
"""Steps after which a time is forgotten."""
WELL_KNOWN = 4
"""Guessed rows for each decoder after which a price is well known. One row among many decoders changes a step by less than chance
does; the price that a few such steps tell is often far too high, and would end all guessing."""
FREE_ROWS = 32
"""Rows whose arithmetic takes as long as reading the weights, until a price is measured: many, so that it will be."""
CAUTION = 1.25
"""What a guess must promise, over its price: of many estimated chances those that look best are estimated too high."""


@dataclass(slots=True)
class Costs:
    """What steps with one certain number of decoders took lately."""

    plain: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=NEWEST))  # step, seconds
    drafted: deque[tuple[int, int, float]] = field(default_factory=lambda: deque(maxlen=TRIED))  # step, rows, price of each

    def forget(self, before: int) -> None:
        for times in (self.plain, self.drafted):
            while times and times[0][0] < before:
                times.popleft()

    def add(self, step: int, rows: int, seconds: float) -> None:
        """A step with so many guessed rows took so long."""
        if not rows:
            self.plain.append((step, seconds))
        elif self.plain:
            baseline = median(seconds for _, seconds in self.plain)
            self.drafted.append((step, rows, (seconds / baseline - 1) / rows))

    def price(self, decoders: int) -> float | None:
        """Of one guessed row, in plain steps; None while too few plain ones are known. Medians: other work may slow any step.
        As long as it isn't well known, the lower quartile: what looks dear by chance is tried again."""
        if len(self.plain) < ENOUGH:
            return None
        if len(self.drafted) < ENOUGH:
            return 1 / (decoders + FREE_ROWS)
        known = [(price, rows) for _, rows, price in self.drafted]
        is_sure = len(known) == TRIED or sum(rows for _, rows in known) >= WELL_KNOWN * decoders
        return max(weighted_quantile(known, 1 / 2 if is_sure else 1 / 4), 1e-3)


class Speculation:
    """Guesses at most `limit` tokens for a sequence and step."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._experience = Experience()
        self._habit = Habit()
        self._costs: defaultdict[int, Costs] = defaultdict(Costs)  # by number of decoders
        self._step = 0

    def drafts(self, slices: Items[Slice]) -> list[list[int]]:
        """For each slice the tokens to try behind its own: none for a piece of a prompt, and none for anybody if it doesn't pay."""
        drafters = [self._drafter(item) for item in slices]
        decoders = sum(drafter is not None for drafter in drafters)
        measured = self._at(decoders).price(decoders) if decoders else None
        if measured is None or CAUTION * measured * decoders >= SURE:  # not even a certain guess would pay: look nothing up
            return [[]] * len(slices)
        chances = [drafter.chance() if drafter else 0.0 for drafter in drafters]
        price = CAUTION * measured
        lengths = best_lengths(chances, [self.room(item) for item in slices], price, decoders)
        return [drafter.draft(length) if drafter else [] for drafter, length in zip(drafters, lengths, strict=True)]

    def learn(self, slices: Items[Slice], seconds: float) -> None:
        """This step took so long, everything included. One with a piece of a prompt teaches nothing."""
        self._step += 1
        if all(item.count == 1 for item in slices):
            self._at(len(slices)).add(self._step, sum(len(item.draft) for item in slices), seconds)

    def _at(self, decoders: int) -> Costs:
        costs = self._costs[decoders]
        costs.forget(self._step - MEMORY)
        return costs

    def _drafter(self, item: Slice) -> Drafter | ForcedDrafter | None:
        """Of the sequence if it decodes in this step, that is, computes its last token alone."""
        sequence = item.sequence
        if item.count > 1 or not item.samples:
            return None
        if sequence.drafter is None:
            lookup = Drafter(sequence.tokens, self._experience)
            held = sequence.matcher is not None
            sequence.drafter = ForcedDrafter(sequence, lookup, self._habit, self.limit) if held else lookup
        return sequence.drafter

    def room(self, item: Slice) -> int:
        """Guesses that could all become output and still be followed by the token that every step gives."""
        return min(self.limit, item.sequence.max_tokens - item.sequence.num_output - 1)


def best_lengths(chances: Items[float], limits: Items[int], price: float, decoders: int) -> list[int]:
    """Guesses for each sequence so that a step gives the most tokens per time.

    The j-th guess of a sequence is right with `chance ** j` and costs `price`, in steps without guesses; such a step gives one
    token to each of the `decoders`. The best ones are taken as long as each gives more per time than the step does without it.
    """
    worth = price * decoders
    gains = [
        (gain, row)
        for row, (chance, limit) in enumerate(zip(chances, limits, strict=True))
        for place in range(1, limit + 1)
        if (gain := chance**place) > worth
    ]
    tokens, time, lengths = float(decoders), 1.0, [0] * len(chances)
    for gain, row in sorted(gains, reverse=True):
        if gain * time <= price * tokens:
            break
        tokens, time = tokens + gain, time + price
        lengths[row] += 1
    return lengths


def weighted_quantile(values: Items[tuple[float, int]], share: float) -> float:
    """Of `(value, weight)` pairs, the value at which this share of the weight is reached."""
    rest = sum(weight for _, weight in values) * share
    for value, weight in sorted(values):
        rest -= weight
        if rest <= 0:
            return value
    raise ValueError("a quantile of nothing")
