"""How many tokens the next step may hold, so that those who already read an answer never wait long for its next word.

Chunked prefill (Sarathi-Serve, OSDI 2024) with a budget in time instead of tokens: what a token of a prompt costs differs a
hundredfold between models and machines and grows with the context, so it is measured. Pure: seconds come in as numbers.
"""

from __future__ import annotations

from collections import deque
from statistics import median

SMALLEST = 16
"""Tokens of a prompt that always go on beside decoders."""
FIRST = 64
"""… that are tried before any were timed."""
PATIENCE = 2.0
"""Times that a step may take its target for the sake of many newcomers."""
NEWEST = 32
"""Steps without a prompt that an estimate is made of."""


class Chunking:
    """A step with decoders should take `target_s`, or twice a step of the decoders alone where that is more; one without, anything.

    Where more wait for their first token than read, the step may take as many times longer, at most `PATIENCE`. `most` tokens are
    never exceeded; a target of 0 asks for nothing else.
    """

    def __init__(self, most: int, target_s: float) -> None:
        self.most, self.target_s = most, target_s
        self._alone: deque[float] = deque(maxlen=NEWEST)
        self._mixed: tuple[int, float] | None = None  # tokens of prompts, seconds: of the last step that had some beside decoders

    def budget(self, decoders: int, newcomers: int = 1) -> int:
        """Tokens of the next step, the decoders' own included. `newcomers` have a prompt that could be computed now."""
        if not decoders or not self.target_s:
            return self.most
        return min(self.most, decoders + self._chunk(self.target_s * min(max(1.0, newcomers / decoders), PATIENCE)))

    def learn(self, decoders: int, prompt_tokens: int, seconds: float) -> None:
        """What a step held and took, everything included."""
        if decoders and prompt_tokens:
            self._mixed = prompt_tokens, seconds
        elif decoders:
            self._alone.append(seconds)

    def _chunk(self, target_s: float) -> int:
        """At most twice the last one: a step that the machine happened to be quick at must not make a giant of the next."""
        if self._mixed is None:
            return FIRST
        tokens, seconds = self._mixed
        decode_s = median(self._alone) if self._alone else 0.0
        per_token_s = max(1e-9, (seconds - decode_s) / tokens)
        fitting = (max(target_s, 2 * decode_s) - decode_s) / per_token_s
        return max(SMALLEST, int(min(fitting, 2 * tokens)))
