"""The soak's requests in an engine, as their callers see them: answers taken, calls hung up, and everything checked all the time.

Whatever is wrong is an AssertionError: an answer too many or too few, one that differs from the answer to the same request before
or hasn't its form, a healthy one that fails, a block or adapter that isn't given back, a request, sequence or matcher that is
still in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from bench.soak_entrance import Entrance
from bench.soak_forms import Form
from bench.soak_memory import retained
from bench.soak_requests import NUM_KNOWN, Leaves, Plan
from cluster.types import FinishReason
from deployments.engine.engine import Engine
from deployments.engine.messages import Output
from deployments.engine.tokenizer import Tokenizer

IN_FLIGHT = 40
CHECK_STEPS = 50
ROUND = 1000
"""Requests until the engine is let run empty once."""


@dataclass(slots=True)
class Open:
    """A request in the engine: what it has answered, the choices that go on, and whether its caller is still to hang up."""

    plan: Plan
    tokens: list[list[int]]
    going_on: set[int]
    leaves: Leaves | None

    @classmethod
    def of(cls, plan: Plan) -> Open:
        n = plan.request.sampling.n
        return cls(plan, [[] for _ in range(n)], set(range(n)), plan.leaves)

    def would_leave(self, in_prompt: bool | None) -> bool:
        """Whether now is the moment. `in_prompt` is None while none of its sequences runs."""
        longest = max(map(len, self.tokens))
        match self.leaves:
            case "while waiting":
                return in_prompt is None and longest == 0
            case "in the prompt":
                return bool(in_prompt) and longest == 0
            case "after the first token":
                return longest == 1
            case "one choice":
                return longest >= 1 and len(self.tokens) > 1
        return longest >= 5


@dataclass
class Soak:
    """Keeps `IN_FLIGHT` requests in an engine, takes their answers, hangs up where the plan says so, and checks all the time."""

    engine: Engine
    requests: Iterator[Plan]
    held: Callable[[], tuple[int, int, int]] = retained
    entrance: Entrance | None = None  # None: everybody enters at once
    tokenizer: Tokenizer | None = None  # where answers have forms
    poison: int | None = None  # the token that makes logits no numbers
    added: int = 0
    answered: int = 0
    hung_up: int = 0  # requests of which nothing went on after an abort
    left: Counter[Leaves] = field(default_factory=Counter)
    repeated: int = 0  # choices whose answer was known before
    cut_off: int = 0  # choices that were aborted in the engine
    failed: int = 0  # choices that were poisoned
    formed: Counter[str] = field(default_factory=Counter)  # complete answers of each kind of form
    unfinished_forms: int = 0  # choices that had no more tokens for their form
    adapted: int = 0  # requests with an adapter
    output_tokens: int = 0
    integrity_checks: int = 0
    _open: dict[int, Open] = field(default_factory=dict)
    _known: dict[tuple[int, int], tuple[list[int], str]] = field(default_factory=dict)
    _round_ends: int = 0
    _held_before: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        self._held_before = self.held()

    @property
    def ended(self) -> int:
        return self.answered + self.hung_up

    def run(self, after_step: Callable[[], None]) -> None:
        steps = 0
        while self._admit():
            for output in self.engine.step():
                self._take(output)
            self._hang_up()
            if self.entrance:
                self.entrance.turn()
            steps += 1
            if steps % CHECK_STEPS == 0:
                self.engine.scheduler.check_integrity()
                self.integrity_checks += 1
            after_step()
        assert self.ended == self.added, f"{self.added} requests, {self.ended} ends"

    def _admit(self) -> bool:
        """Fill up, and let everything end between two rounds. Whether there is anything to do."""
        if not self._open:
            self._check_idle()
            self._round_ends = self.added + ROUND
        while len(self._open) < IN_FLIGHT and self.added < self._round_ends and (plan := next(self.requests, None)):
            if self.entrance:
                self.entrance.add(plan.request, plan.adapter)
            else:
                self.engine.add(plan.request)
            self._open[plan.request.id] = Open.of(plan)
            self.added += 1
            self.adapted += plan.adapter is not None
        return bool(self._open)

    def _take(self, output: Output) -> None:
        number, request = output.request_id, self._open.get(output.request_id)
        assert request, f"request {number} got a token after its end"
        assert output.index in request.going_on, f"choice {output.index} of request {number} got a token after its end"
        is_poisoned = self._is_poisoned(request, output.index)
        assert is_poisoned == (output.finish_reason == "error"), f"request {number} is {'' if is_poisoned else 'not '}poisoned"
        if is_poisoned:
            self.failed += 1
        else:
            request.tokens[output.index].append(output.token)
            self.output_tokens += 1
        if output.finish_reason:
            self._check_end(request, output, output.finish_reason)
            request.going_on.discard(output.index)
        if not request.going_on:
            self._end(number)
            self.answered += 1

    def _is_poisoned(self, request: Open, index: int) -> bool:
        return self.poison is not None and (self.poison in request.plan.request.prompt or self.poison in request.tokens[index])

    def _end(self, number: int) -> None:
        del self._open[number]
        if self.entrance:
            self.entrance.ended(number)

    def _check_end(self, request: Open, output: Output, reason: FinishReason) -> None:
        wanted, tokens = request.plan.request, request.tokens[output.index]
        if reason == "length":
            assert len(tokens) == wanted.max_tokens, f"request {wanted.id} ended after {len(tokens)} tokens"
        if request.plan.form:
            self._check_form(request.plan.form, tokens, reason)
        elif reason != "error":
            met_stop = output.token in wanted.stop_ids and len(tokens) > wanted.sampling.min_tokens
            assert met_stop == (reason == "stop"), f"request {wanted.id} ended for another reason"
        if request.plan.known is not None:
            answer = tokens, str(reason)
            first = self._known.setdefault((request.plan.known, output.index), answer)
            assert answer == first, f"request {wanted.id} has another answer than before"
            self.repeated += answer is not first

    def _check_form(self, form: Form, tokens: list[int], reason: FinishReason) -> None:
        assert self.tokenizer, "forms are forms of text"
        if reason == "stop":
            form.check(self.tokenizer.decode(tokens))
            self.formed[form.kind] += 1
        self.unfinished_forms += reason == "length"

    def _hang_up(self) -> None:
        leaving = {number: request for number, request in self._open.items() if request.leaves}
        in_prompt = {sequence.request_id: sequence.in_prompt for sequence in self.engine.scheduler.running} if leaving else {}
        for number, request in leaving.items():
            if request.would_leave(in_prompt.get(number)):
                self._cut_off(number, request)

    def _cut_off(self, number: int, request: Open) -> None:
        assert request.leaves
        one = max(request.going_on) if request.leaves == "one choice" else None
        cut = set(request.going_on) if one is None else {one}
        if self.entrance:
            was_inside = self.entrance.abort(number, one)
        else:
            self.engine.abort(number, one)
            was_inside = True
        self.left[request.leaves] += 1
        self.cut_off += len(cut) if was_inside else 0
        request.going_on -= cut
        request.leaves = None
        if not request.going_on:
            self._end(number)
            self.hung_up += 1

    def _check_idle(self) -> None:
        """Between rounds nothing is held, and the engine's own counts are ours."""
        self.engine.scheduler.check_integrity()
        self.integrity_checks += 1
        stats = self.engine.stats()
        assert not self.engine.has_work, f"{stats.running} sequences run and {stats.waiting} wait for nobody"
        assert stats.blocks_used == 0, f"{stats.blocks_used} blocks leaked"
        counts = (stats.output_tokens, stats.aborted, stats.failed)
        assert counts == (self.output_tokens, self.cut_off, self.failed), f"the engine counts something else: {counts}"
        if self.entrance:
            self.entrance.check_idle()
        requests, sequences, matchers = (now - before for now, before in zip(self.held(), self._held_before, strict=True))
        assert sequences <= 0, f"{sequences} sequences are still in memory"
        assert matchers <= 0, f"{matchers} matchers are still in memory"
        assert requests <= NUM_KNOWN, f"{requests - NUM_KNOWN} requests are still in memory"
