"""The requests of the soak: of every length and kind, of several tenants, some of whom hang up. A seed gives them all."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from cluster.types import Sampling
from deployments.engine.engine import Request

Leaves = Literal["while waiting", "in the prompt", "after the first token", "later", "one choice"]
LEAVES: tuple[Leaves, ...] = get_args(Leaves)
SALTS = [bytes([tenant]) * 16 for tenant in range(5)]
"""Secrets that keep the tenants' prefixes apart."""
NUM_KNOWN = 8
"""Requests that are made again and again, and whose answers must never change."""


@dataclass(frozen=True)
class Plan:
    """A request and how it ends: answered (`leaves` is None), or by its caller. `known`: which of the repeated ones it is."""

    request: Request
    leaves: Leaves | None = None
    known: int | None = None


def plans(seed: int, count: int, *, vocab_size: int, max_model_len: int) -> Iterator[Plan]:
    rng = random.Random(seed)
    known = [draw(rng, 0, vocab_size, max_model_len) for _ in range(NUM_KNOWN)]
    for number in range(count):
        if rng.random() < 0.1:
            which = rng.randrange(NUM_KNOWN)
            yield Plan(_from_tenant(rng, number, known[which]), known=which)
        else:
            leaves = rng.choice(LEAVES) if rng.random() < 0.25 else None
            yield Plan(draw(rng, number, vocab_size, max_model_len), leaves)


def draw(rng: random.Random, number: int, vocab_size: int, max_model_len: int) -> Request:
    """Mostly short, some as long as the context window allows; half of the prompts begin as others do."""
    tenant = rng.randrange(len(SALTS))
    shared = random.Random(tenant).choices(range(vocab_size), k=64)[: rng.choice((0, 0, 17, 64))]
    length = 1 + min(int(rng.expovariate(1 / 30)), max_model_len - 64 - 48 - 1)
    prompt = shared + rng.choices(range(vocab_size), k=length)
    max_tokens = 1 + min(int(rng.expovariate(1 / 10)), 47)
    sampling = draw_sampling(rng, vocab_size, max_tokens)
    stop_ids = rng.sample(range(vocab_size), rng.choice((0, 0, 1, 20)))
    return Request(number, prompt, sampling, max_tokens, stop_ids, rng.getrandbits(63), SALTS[tenant])


def draw_sampling(rng: random.Random, vocab_size: int, max_tokens: int) -> Sampling:
    return Sampling(
        temperature=rng.choice((0.0, 0.0, 0.5, 1.0, 2.0)),
        top_k=rng.choice((0, 0, 1, 20)),
        top_p=rng.choice((1.0, 1.0, 0.9, 0.01)),
        min_p=rng.choice((0.0, 0.0, 0.05)),
        repetition_penalty=rng.choice((1.0, 1.0, 1.0, 1.2)),
        presence_penalty=rng.choice((0.0, 0.0, 0.5)),
        frequency_penalty=rng.choice((0.0, 0.0, 0.5)),
        logit_bias=((rng.randrange(vocab_size), 5.0),) if rng.random() < 0.1 else (),
        logprobs=rng.choice((None, None, None, 0, 5)),
        min_tokens=rng.choice((0, 0, 0, min(3, max_tokens))),
        n=rng.choice((1, 1, 1, 1, 1, 1, 2, 4)),
    )


def _from_tenant(rng: random.Random, number: int, request: Request) -> Request:
    """Another number and tenant; neither may change the answer."""
    return Request(number, request.prompt, request.sampling, request.max_tokens, request.stop_ids, request.seed, rng.choice(SALTS))
