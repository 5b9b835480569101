"""Answers of a given form: which tokens may come next in a sequence that is held to a JSON schema, an expression or a grammar.

All parsing is llguidance's: an Earley parser over lexers that are made, as they are needed, by derivatives of regular expressions.
Here are only its limits, its view of a model's vocabulary, and what becomes of a sequence when it fails. Used by rank 0 and, beside
it, by the processes that try a constraint out before anybody serves it (`trial.py`).

The vocabulary is given as the bytes that the detokeniser shows, so that what was matched is what a caller reads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cluster.types import Constraint
from deployments.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

WHITESPACE = r"[ \t\n\r]{1,40}"
"""Between the parts of a JSON text. Bounded, because a model may otherwise say nothing else until its tokens are used up."""
MAX_KEPT = 16
"""Compiled constraints that are kept for the next request with the same one."""
MAX_USES = 256
"""Sequences after which a constraint is compiled anew: they share a lexer, whose table only grows, up to its limit."""

_COMPLETE = frozenset({"NoExtension", "EndOfSentence"})

Allowed = npt.NDArray[np.uint32]
"""Which tokens may come next in one sequence: token t may if bit t % 32 of word t // 32 is set. Bits beyond the last token say
nothing."""


def unpacked(bits: Allowed, width: int) -> npt.NDArray[np.bool_]:
    """A truth value for each of `width` tokens."""
    return np.unpackbits(bits.astype("<u4", copy=False).view(np.uint8), count=width, bitorder="little").view(np.bool_)


class Matcher:
    """How far one sequence is in its grammar. Never raises: what goes wrong is remembered, and ends this sequence alone."""

    def __init__(self, constraint: Constraint, state: LLMatcher | None) -> None:
        self.constraint = constraint
        self._state = state
        self.is_finished = False  # the answer is complete, and nothing can follow

    @property
    def state(self) -> LLMatcher | None:
        """None once it has failed."""
        return self._state

    def take(self, token: int) -> None:
        """A token was sampled."""
        if self._state is None:
            return
        if not self._state.consume_token(token):
            self.fail()
        elif self._state.is_stopped():
            self.is_finished = self._state.stop_reason() in _COMPLETE
            if not self.is_finished:
                self.fail()

    def fitting(self, tokens: list[int]) -> int:
        """How many of these tokens, from the first on, may follow here."""
        return self._state.validate_tokens(tokens) if self._state and tokens else 0

    def forced(self, limit: int) -> list[int]:
        """Tokens that follow for certain, at most `limit`."""
        return self._state.compute_ff_tokens()[:limit] if self._state else []

    def fail(self) -> None:
        self._state = None

    @property
    def has_failed(self) -> bool:
        return self._state is None


class Grammars:
    """One model's compiled constraints. Light until the first is asked for: then the vocabulary is read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._loading = threading.Lock()
        self._tokens: LLTokenizer | None = None
        self._kept: OrderedDict[Constraint, _Kept] = OrderedDict()

    def has(self, constraint: Constraint) -> bool:
        """Whether `matcher` has nothing to compile."""
        kept = self._kept.get(constraint)
        return kept is not None and kept.uses < MAX_USES

    def compile(self, constraint: Constraint) -> LLMatcher | None:
        """From any thread; None for what can't be compiled, which admission lets nobody send. Raises ModelNotServable for a
        directory without a usable tokenizer."""
        with self._loading:
            if self._tokens is None:
                self._tokens = vocabulary(Tokenizer.load(self._directory))
        try:
            base = compiled(constraint, self._tokens, limits())
        except ValueError:
            return None
        return None if base.is_error() else base

    def keep(self, constraint: Constraint, base: LLMatcher | None) -> None:
        """For the requests to come."""
        self._kept[constraint] = _Kept(base)
        self._kept.move_to_end(constraint)
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    def matcher(self, constraint: Constraint) -> Matcher:
        """A new sequence's. One that can't be compiled has failed from the beginning."""
        if not self.has(constraint):
            self.keep(constraint, self.compile(constraint))
        kept = self._kept[constraint]
        kept.uses += 1
        return Matcher(constraint, kept.base.deep_copy() if kept.base else None)

    def allowed(self, matchers: Items[Matcher], width: int) -> Allowed:
        """For each of R sequences, which of `width` tokens may come next: R rows of bits. One that lets none follow has failed.

        One after the other: a mask takes about 10 us, and sequences of one constraint share a lexer behind a lock."""
        assert self._tokens is not None, "matchers come from here"
        known, words = -(-self._tokens.vocab_size // 32), -(-width // 32)
        bits = np.zeros((len(matchers), max(known, words)), np.uint32)
        for matcher, row in zip(matchers, bits, strict=True):
            if matcher.state:
                matcher.state.unsafe_compute_mask_ptr(row.ctypes.data, known * row.itemsize)
        allowed = bits[:, :words]
        allowed[:, -1] &= np.uint32(0xFFFFFFFF >> -width % 32)
        for matcher, can_go_on in zip(matchers, np.any(allowed, axis=1), strict=True):
            if not can_go_on or matcher.state is None or matcher.state.is_error():  # its mask is that of a finished one
                matcher.fail()
                self._kept.pop(matcher.constraint, None)  # what is full may be the lexer, which others share
        return allowed


@dataclass(slots=True)
class _Kept:
    base: LLMatcher | None
    uses: int = 0


def compiled(constraint: Constraint, tokens: LLTokenizer, bounds: LLParserLimits) -> LLMatcher:
    """At the beginning of an answer. What is wrong with the constraint, or too much for the bounds, the matcher says itself.
    Raises ValueError for a schema that is no JSON."""
    from llguidance import LLMatcher

    return LLMatcher(tokens, source(constraint), log_level=0, limits=bounds)


def source(constraint: Constraint) -> str:
    """In llguidance's own notation."""
    from llguidance import LLMatcher

    match constraint.kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema('{"type":"object"}', overrides={"whitespace_pattern": WHITESPACE})
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(constraint.text, overrides={"whitespace_pattern": WHITESPACE})
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.text)
        case "grammar":
            return LLMatcher.grammar_from_lark(constraint.text)


def limits() -> LLParserLimits:
    """What compiling and one step of one sequence may cost, in llguidance's units: about 20 ms and 5 ms on one core, and 32 MB. A
    lexer can take longer all the same where a repetition is repeated; `trial.py` walks into those."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_items_in_row=2_000,
        max_lexer_states=16_000,
        max_grammar_size=200_000,
        verbose_errors=False,  # they would repeat the answer so far
    )


def vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    """The tokens as llguidance wants them. Special ones are in it by name: only a grammar that names one lets it through."""
    from llguidance import LLTokenizer

    known = _Vocabulary(tokenizer)
    known.trie = LLTokenizer(known, eos_token=_ends(tokenizer) or None)  # type: ignore[arg-type]
    return known.trie


def _ends(tokenizer: Tokenizer) -> list[int]:
    return sorted(token for token in tokenizer.eos_ids if token < tokenizer.vocab_size)


class _Vocabulary:
    """What LLTokenizer asks for."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    trie: LLTokenizer | None = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        special = tokenizer.special_ids
        self.tokens = [
            tokenizer.token_text(token).encode() if token in special else tokenizer.token_bytes(token)
            for token in range(tokenizer.vocab_size)
        ]
        self.special_token_ids = sorted(special)
        self.eos_token_id = min(_ends(tokenizer), default=None)

    def __call__(self, text: str) -> list[int]:
        """As the model is used to it: what a grammar forces is forced in these tokens."""
        tokens = self._tokenizer.encode_inside(text)
        if tokens is None and self.trie:
            tokens = self.trie.greedy_tokenize(text)
        return tokens or []
