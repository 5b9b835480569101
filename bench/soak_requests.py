"""The requests of the soak: of every length and kind, of several tenants, some of whom hang up. A seed gives them all."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from bench.soak_forms import Form, draw_call, draw_form
from bench.soak_model import NUM_ADAPTERS
from cluster.types import Sampling
from deployments.engine.messages import Request

Leaves = Literal["while waiting", "in the prompt", "after the first token", "later", "one choice"]
LEAVES: tuple[Leaves, ...] = get_args(Leaves)
Kind = Literal["forms", "calls", "adapters", "poison"]
KINDS: dict[Kind, float] = {"forms": 0.15, "calls": 0.05, "adapters": 0.3, "poison": 0.01}
"""Shares of the requests that are held to a form, must call a function, have an adapter (all three at once happen), and whose
prompt holds a token that makes logits no numbers."""
SALTS = [bytes([tenant]) * 16 for tenant in range(5)]
"""Secrets that keep the tenants' prefixes apart."""
MOST_TOKENS, MOST_TOKENS_OF_A_FORM = 48, 80
"""Of an answer. A form takes some until it is complete."""
KNOWN: list[frozenset[Kind]] = [
    *[frozenset[Kind]()] * 6,
    *[frozenset[Kind](("adapters",))] * 2,
    *[frozenset[Kind](("forms",))] * 2,
    frozenset(("calls",)),
    frozenset(("adapters", "forms")),
]
"""Of which kinds the requests are that are made again and again, and whose answers must never change."""
NUM_KNOWN = len(KNOWN)


@dataclass(frozen=True)
class Plan:
    """A request and how it ends: answered (`leaves` is None), or by its caller. `known`: which of the repeated ones it is.
    `adapter`: by number; the request itself gets it where it has a slot."""

    request: Request
    leaves: Leaves | None = None
    known: int | None = None
    adapter: int | None = None
    form: Form | None = None


def plans(seed: int, count: int, *, vocab_size: int, max_model_len: int, without: frozenset[Kind] = frozenset()) -> Iterator[Plan]:
    """The model's last token is the poison, the one before ends a turn."""
    rng = random.Random(seed)
    known = [draw(rng, 0, vocab_size, max_model_len, kinds - without) for kinds in KNOWN]
    for number in range(count):
        if rng.random() < 0.1:
            which = rng.randrange(NUM_KNOWN)
            yield replace(known[which], request=_from_tenant(rng, number, known[which].request), known=which)
        else:
            leaves = rng.choice(LEAVES) if rng.random() < 0.25 else None
            kinds = frozenset(kind for kind, share in KINDS.items() if rng.random() < share)
            yield replace(draw(rng, number, vocab_size, max_model_len, kinds - without), leaves=leaves)


def draw(rng: random.Random, number: int, vocab_size: int, max_model_len: int, kinds: frozenset[Kind]) -> Plan:
    """Mostly short, some as long as the context window allows; half of the prompts begin as others do."""
    tenant = rng.randrange(len(SALTS))
    form = draw_call(rng) if "calls" in kinds else draw_form(rng) if "forms" in kinds else None
    healthy = range(vocab_size - 1)
    shared = random.Random(tenant).choices(healthy, k=64)[: rng.choice((0, 0, 17, 64))]
    most = MOST_TOKENS_OF_A_FORM if form else MOST_TOKENS
    length = 1 + min(int(rng.expovariate(1 / 30)), max_model_len - 64 - most - 1)
    prompt = shared + rng.choices(healthy, k=length)
    if "poison" in kinds:
        prompt[rng.randrange(len(prompt))] = vocab_size - 1
    max_tokens = most if form else 1 + min(int(rng.expovariate(1 / 10)), most - 1)
    sampling = draw_sampling(rng, vocab_size, max_tokens)
    if form:
        sampling = replace(sampling, constraint=form.constraint)
    stop_ids = [vocab_size - 2] if form else rng.sample(range(vocab_size), rng.choice((0, 0, 1, 20)))
    request = Request(number, prompt, sampling, max_tokens, stop_ids, rng.getrandbits(63), SALTS[tenant])
    return Plan(request, adapter=rng.randrange(NUM_ADAPTERS) if "adapters" in kinds else None, form=form)


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
