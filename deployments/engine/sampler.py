"""From logits to tokens, for a whole step at once. Runs on rank 0 only.

Order, as in transformers and vLLM: repetition, frequency and presence penalties and logit bias -> greedy, or temperature ->
top-k -> top-p -> min-p -> a draw. What a grammar forbids is -inf behind penalties and bias, so that none can lift it. Log
probabilities are those of the model itself, before any of it, as the OpenAI API has them.

A row that isn't finite (a NaN, +Inf, or nothing but -Inf) gives no token, whatever was asked for; so does one in which nothing is
allowed. Other rows don't notice.

A draw takes the token at which the sum of the probabilities, in the order of the vocabulary, passes a number between 0 and 1. That
number is a function of the sequence's seed and the token's place alone, so that neither batch-mates nor a preemption changes an
answer. `Readable` is the specification of `native/sampling.cpp`, and serves where that can't be built.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cluster.types import Sampling
from deployments.engine.sequence import NO_TOKEN, Sequence
from deployments.engine.structured import Allowed, unpacked


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen token, or NO_TOKEN where none can be; with `logprobs` asked for, its log probability and the k most likely tokens
    with theirs, best first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


ALL: Mapping[int, Allowed] = MappingProxyType({})
"""Of a step in which no row is held to a form."""

_64_BITS = (1 << 64) - 1


class Sampler(Protocol):
    """The three parts of a choice, over `R x V` logits in float32 on the CPU, one row for each of `sequences`."""

    def adjust(self, logits: Tensor, sequences: Items[Sequence], rows: Items[int]) -> list[int]:
        """Put penalties and bias on these rows of `logits`. Returns those that weren't finite before."""

    def choose(self, logits: Tensor, sequences: Items[Sequence], allowed: Mapping[int, Allowed] = ALL) -> list[int]:
        """From adjusted logits to a token for each row; NO_TOKEN where a row isn't finite or nothing is left of it. `allowed`
        says, by row, which tokens may be chosen where not all may. May change `logits` in these rows."""

    def report(self, logits: Tensor, wanted: Items[Wanted]) -> list[Sampled]:
        """Log probabilities from the model's own logits."""


class Wanted(NamedTuple):
    """A row whose log probabilities are asked for, the token that it got, and how many of the most likely ones."""

    row: int
    token: int
    best: int


class Readable:
    """The specification of every `Sampler`."""

    def adjust(self, logits: Tensor, sequences: Items[Sequence], rows: Items[int]) -> list[int]:
        poisoned = [row for row in rows if not logits[row].amax().isfinite()]
        for row in rows:
            logits[row] = adjust(logits[row], sequences[row])
        return poisoned

    def choose(self, logits: Tensor, sequences: Items[Sequence], allowed: Mapping[int, Allowed] = ALL) -> list[int]:
        return choose(logits, sequences, allowed)

    def report(self, logits: Tensor, wanted: Items[Wanted]) -> list[Sampled]:
        logprobs = torch.log_softmax(rows_of(logits, [each.row for each in wanted]), -1)
        return [_report(each, own) for each, own in zip(wanted, logprobs, strict=True)]


READABLE = Readable()


def choose(logits: Tensor, sequences: Items[Sequence], allowed: Mapping[int, Allowed] = ALL) -> list[int]:
    """As `Sampler.choose` says."""
    forbid(logits, sequences, allowed)
    tokens = best(logits)
    draws = [row for row, s in enumerate(sequences) if tokens[row] != NO_TOKEN and s.sampling.temperature > 0]
    if draws:
        for row, token in zip(draws, draw(rows_of(logits, draws).float(), [sequences[row] for row in draws]), strict=True):
            tokens[row] = token
    return tokens


def sample(
    logits: Tensor, sequences: Items[Sequence], sampler: Sampler = READABLE, allowed: Mapping[int, Allowed] = ALL
) -> list[Sampled]:
    """`R x V` logits on any device, one row for each sequence. May change `logits`. `allowed`: see `Sampler`."""
    if logits.device.type == "cpu":
        return sample_here(logits, sequences, sampler, allowed)
    return sample_there(logits, sequences, sampler, allowed)


def rows_of(logits: Tensor, rows: Items[int]) -> Tensor:
    """A copy of these, which may be named in any order. On a CPU it takes a seventh of the time of an index in brackets."""
    return logits.index_select(0, torch.tensor(rows, device=logits.device))


@torch.inference_mode()
def sample_there(
    logits: Tensor, sequences: Items[Sequence], sampler: Sampler = READABLE, allowed: Mapping[int, Allowed] = ALL
) -> list[Sampled]:
    """Plain greedy rows on the device that has the logits, so that only their tokens come from it; the others come whole."""
    most, tokens = logits.max(-1)
    found = [
        Sampled(token if finite else NO_TOKEN) for token, finite in zip(tokens.tolist(), most.isfinite().tolist(), strict=True)
    ]
    rows = [row for row, sequence in enumerate(sequences) if row in allowed or not _is_plain(sequence)]
    if rows:
        wanted = rows_of(logits, rows).cpu()
        theirs = {place: allowed[row] for place, row in enumerate(rows) if row in allowed}
        for row, sampled in zip(rows, sample_here(wanted, [sequences[row] for row in rows], sampler, theirs), strict=True):
            found[row] = sampled
    return found


@torch.inference_mode()
def sample_here(
    logits: Tensor, sequences: Items[Sequence], sampler: Sampler = READABLE, allowed: Mapping[int, Allowed] = ALL
) -> list[Sampled]:
    """The same on the CPU."""
    logits = logits.float().contiguous()
    counts = {row: s.sampling.logprobs for row, s in enumerate(sequences) if s.sampling.logprobs is not None}
    changed = [row for row, s in enumerate(sequences) if _is_adjusted(s.sampling) or bans_stop(s)]
    raw = logits.clone() if counts and (changed or allowed) else logits
    poisoned = sampler.adjust(logits, sequences, changed) if changed else []
    tokens = sampler.choose(logits, sequences, allowed)
    for row in poisoned:  # whatever is left of it
        tokens[row] = NO_TOKEN
    found = [Sampled(token) for token in tokens]
    wanted = [Wanted(row, tokens[row], count) for row, count in counts.items() if tokens[row] != NO_TOKEN]
    if wanted:
        for each, sampled in zip(wanted, sampler.report(raw, wanted), strict=True):
            found[each.row] = sampled
    return found


def adjust(row: Tensor, sequence: Sequence) -> Tensor:
    """Penalties and bias on one row of V logits. Repetition (CTRL, Keskar 2019) looks at all tokens, the others at the output."""
    sampling = sequence.sampling
    row = row.float()
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.tokens)))
        scores = row[seen]
        row[seen] = torch.where(scores > 0, scores / sampling.repetition_penalty, scores * sampling.repetition_penalty)
    output = sequence.tokens[sequence.num_prompt :]
    if output and (sampling.frequency_penalty or sampling.presence_penalty):
        tokens, counts = np.unique(output, return_counts=True)
        row[tokens] -= torch.from_numpy(counts * sampling.frequency_penalty + sampling.presence_penalty).float()
    if sampling.logit_bias:
        biased, bias = zip(*sampling.logit_bias, strict=True)
        row.index_add_(0, torch.tensor(biased), torch.tensor(bias))
    if bans_stop(sequence):
        row[list(sequence.stop_ids)] = -torch.inf
    return row


def forbid(logits: Tensor, sequences: Items[Sequence], allowed: Mapping[int, Allowed]) -> None:
    """-inf in `logits` for every token that isn't allowed in its row, and for all of a row that has a NaN or +inf. A row in which
    only tokens are allowed that may not come yet (`min_tokens`) gets one of them all the same: no answer is longer than its
    grammar."""
    for row, bits in allowed.items():
        kept = torch.from_numpy(unpacked(bits, logits.shape[1]))
        is_sound = bool(logits[row].amax() < torch.inf)
        logits[row].masked_fill_(~kept if is_sound else torch.ones_like(kept), -torch.inf)
        if is_sound and bans_stop(sequences[row]) and logits[row].max() == -torch.inf:
            logits[row, kept] = 0.0


def draw(logits: Tensor, sequences: Items[Sequence]) -> list[int]:
    """One token for each row of `R x V` float32 logits, all with a temperature above zero."""
    logits = logits / torch.tensor([s.sampling.temperature for s in sequences])[:, None]
    if any(s.sampling.top_k or s.sampling.top_p < 1 or s.sampling.min_p for s in sequences):
        logits = truncate(logits, [s.sampling for s in sequences])
    sums = (logits - logits.amax(-1, keepdim=True)).double().exp().cumsum(-1)
    wanted = torch.tensor([uniform(s.seed, s.num_output) for s in sequences], dtype=torch.float64)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, wanted, right=True).clamp_max_(logits.shape[1] - 1)[:, 0].tolist()


def best(logits: Tensor) -> list[int]:
    """The first largest column of each row, NO_TOKEN for a row that gives none. By numpy, whose argmax is vectorised (on CPUs it
    takes a tenth of torch's time) and stops at a NaN."""
    rows = logits.float().numpy()
    tokens = rows.argmax(-1)
    found = np.isfinite(rows[np.arange(len(rows)), tokens])
    return (tokens if found.all() else np.where(found, tokens, NO_TOKEN)).tolist()  # type: ignore[no-any-return]


def truncate(logits: Tensor, samplings: Items[Sampling]) -> Tensor:
    """-inf for every token that top-k, top-p (Holtzman 2020) or min-p (Nguyen 2024) leaves out; the best token always stays."""
    ordered, order = logits.sort(-1, descending=True)
    rank = torch.arange(logits.shape[1])
    probabilities = ordered.softmax(-1)
    top_k = torch.tensor([s.top_k or logits.shape[1] for s in samplings])[:, None]
    out = rank >= top_k
    probabilities = probabilities.masked_fill(out, 0)
    probabilities /= probabilities.sum(-1, keepdim=True)
    out |= probabilities.cumsum(-1) - probabilities >= torch.tensor([s.top_p for s in samplings])[:, None]
    out |= probabilities < torch.tensor([s.min_p for s in samplings])[:, None] * probabilities[:, :1]
    out[:, 0] = False
    return torch.empty_like(logits).scatter_(1, order, ordered.masked_fill(out, -torch.inf))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a function of its arguments alone: output `position` of SplitMix64 (Steele 2014) from state `seed`."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _64_BITS
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _64_BITS
    return float((z ^ z >> 31) >> 11) * 2.0**-53


def _is_adjusted(sampling: Sampling) -> bool:
    plain = sampling.repetition_penalty == 1.0 and not sampling.frequency_penalty and not sampling.presence_penalty
    return not plain or bool(sampling.logit_bias)


def _is_plain(sequence: Sequence) -> bool:
    """Whether the largest of the model's own logits is the answer, and all of it."""
    sampling = sequence.sampling
    asks = sampling.temperature > 0 or sampling.logprobs is not None or sampling.constraint is not None
    return not (asks or _is_adjusted(sampling) or bans_stop(sequence))


def bans_stop(sequence: Sequence) -> bool:
    """Whether it is too short to end."""
    return bool(sequence.stop_ids) and sequence.num_output < sequence.sampling.min_tokens


def _report(wanted: Wanted, logprobs: Tensor) -> Sampled:
    values, tokens = logprobs.topk(min(wanted.best, len(logprobs)))
    return Sampled(wanted.token, float(logprobs[wanted.token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
