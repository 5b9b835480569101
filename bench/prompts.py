"""Prompts of random tokens, the same for all who are compared: nothing in them repeats, so that no cache and no guess helps anybody
but by design."""

from __future__ import annotations

import random

SPECIAL = 3
"""Token ids that models keep for themselves, the lowest ones."""


def random_tokens(numbers: random.Random, length: int, vocab_size: int) -> list[int]:
    return [numbers.randrange(SPECIAL, vocab_size) for _ in range(length)]


def random_prompts(seed: int, count: int, length: int, vocab_size: int) -> list[list[int]]:
    numbers = random.Random(seed)
    return [random_tokens(numbers, length, vocab_size) for _ in range(count)]
