"""Grammars run by llguidance's own matcher over a tokenizer of ours, one random allowed token after the other."""

from __future__ import annotations

import random

from llguidance import LLMatcher, LLTokenizer

from deployments.engine.tokenizer import Tokenizer


class _Vocabulary:
    """What llguidance asks of a tokenizer: every token's bytes, and which are special."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        special = tokenizer.special_ids
        ids = range(tokenizer.vocab_size)
        self.tokens = [tokenizer.token_text(i).encode() if i in special else tokenizer.token_bytes(i) for i in ids]
        self.special_token_ids = sorted(special)
        self.eos_token_id = min(tokenizer.eos_ids)

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


class Grammars:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._tokens = LLTokenizer(_Vocabulary(tokenizer))
        self._ends = tokenizer.eos_ids

    def matcher(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_lark(grammar), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def takes(self, grammar: str, ids: list[int]) -> bool:
        """Whether this is an answer, whole, that the grammar allows."""
        matcher = self.matcher(grammar)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def begins(self, grammar: str, ids: list[int]) -> bool:
        return self.matcher(grammar).try_consume_tokens(ids) == len(ids)

    def sample(self, grammar: str, seed: int, *, most: int = 400, after: list[int] | None = None) -> list[int]:
        """Random tokens, up to one that ends the answer; what closes things is preferred once it is long."""
        numbers, matcher = random.Random(seed), self.matcher(grammar)
        ids = list(after or [])
        assert matcher.try_consume_tokens(ids) == len(ids)
        while not matcher.is_stopped() and len(ids) < most:
            bits = matcher.compute_bitmask()
            allowed = [i for i in range(self.tokenizer.vocab_size) if bits[i // 8] >> i % 8 & 1]
            assert allowed, matcher.get_error()
            token = self._closing(numbers, allowed) if len(ids) > most // 4 else numbers.choice(allowed)
            if token in self._ends:
                return ids
            assert matcher.consume_token(token), matcher.get_error()
            ids.append(token)
        return ids

    def _closing(self, numbers: random.Random, allowed: list[int]) -> int:
        ends = [token for token in allowed if token in self._ends]
        closing = [token for token in allowed if self.tokenizer.token_text(token) in ("}", "]", '"')]
        return numbers.choice(ends or closing or allowed)
