"""From logits to tokens, for a whole step at once. Runs on rank 0 only.

Order, as in transformers and vLLM: repetition, frequency and presence penalties and logit bias -> greedy, or temperature ->
top-k -> top-p -> min-p -> a draw. Log probabilities are those of the model itself, before any of it, as the OpenAI API has them.

A draw takes the token with the largest `logit + noise` (Gumbel-max, which draws from the softmax); the noise is a function of
the sequence's seed and the token's place alone, so that neither batch-mates nor a preemption changes an answer.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.types import Sampling
from deployments.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen token; with `logprobs` asked for, its log probability and the k most likely tokens with theirs, best first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, sequences: Items[Sequence]) -> list[Sampled]:
    """`R x V` logits on any device, one row for each sequence. May change `logits`. A plain greedy step is one argmax."""
    return sample_here(logits, sequences) if logits.device.type == "cpu" else sample_there(logits, sequences)


@torch.inference_mode()
def sample_there(logits: Tensor, sequences: Items[Sequence]) -> list[Sampled]:
    """Plain greedy rows on the device that has the logits, so that only their tokens come from it; the others come whole."""
    found = [Sampled(token) for token in logits.argmax(-1).tolist()]
    rows = [row for row, sequence in enumerate(sequences) if not _is_plain(sequence)]
    if rows:
        wanted = logits[torch.tensor(rows, device=logits.device)].cpu()
        for row, sampled in zip(rows, sample_here(wanted, [sequences[row] for row in rows]), strict=True):
            found[row] = sampled
    return found


@torch.inference_mode()
def sample_here(logits: Tensor, sequences: Items[Sequence]) -> list[Sampled]:
    """The same on the CPU."""
    reports = {row: s.sampling.logprobs for row, s in enumerate(sequences) if s.sampling.logprobs is not None}
    raw = logits[list(reports)].float() if reports else logits
    for row, sequence in enumerate(sequences):
        if _is_adjusted(sequence.sampling) or _bans_stop(sequence):
            logits[row] = adjust(logits[row], sequence)
    draws = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]
    tokens = largest(logits)
    if draws:
        for row, token in zip(draws, draw(logits[draws].float(), [sequences[row] for row in draws]), strict=True):
            tokens[row] = token
    if not reports:
        return [Sampled(token) for token in tokens]
    named = dict(zip(reports, torch.log_softmax(raw, -1), strict=True))
    return [_report(token, named[row], reports[row]) if row in reports else Sampled(token) for row, token in enumerate(tokens)]


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
    for token, bias in sampling.logit_bias:
        row[token] += bias
    if _bans_stop(sequence):
        row[list(sequence.stop_ids)] = -torch.inf
    return row


def draw(logits: Tensor, sequences: Items[Sequence]) -> list[int]:
    """One token for each row of `R x V` float32 logits, all with a temperature above zero."""
    logits = logits / torch.tensor([s.sampling.temperature for s in sequences])[:, None]
    if any(s.sampling.top_k or s.sampling.top_p < 1 or s.sampling.min_p for s in sequences):
        logits = truncate(logits, [s.sampling for s in sequences])
    noise = torch.stack([gumbel(s.seed, s.num_output, logits.shape[1]) for s in sequences])
    return largest(logits + noise)


def largest(logits: Tensor) -> list[int]:
    """The first largest column of each row. By numpy, whose argmax is vectorised: on CPUs it takes a tenth of torch's time."""
    return logits.float().numpy().argmax(-1).tolist()  # type: ignore[no-any-return]


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


def gumbel(seed: int, position: int, size: int) -> Tensor:
    """Standard Gumbel noise that depends on nothing but its arguments (Philox, a counter-based generator: Salmon 2011)."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position]))
    uniform = torch.from_numpy(generator.random(size, np.float32)).clamp_min_(1e-20)
    return -torch.log(-torch.log(uniform).clamp_max_(-1e-20))


def _is_adjusted(sampling: Sampling) -> bool:
    plain = sampling.repetition_penalty == 1.0 and not sampling.frequency_penalty and not sampling.presence_penalty
    return not plain or bool(sampling.logit_bias)


def _is_plain(sequence: Sequence) -> bool:
    """Whether the largest of the model's own logits is the answer, and all of it."""
    sampling = sequence.sampling
    asks = sampling.temperature > 0 or sampling.logprobs is not None or sampling.constraint is not None
    return not (asks or _is_adjusted(sampling) or _bans_stop(sequence))


def _bans_stop(sequence: Sequence) -> bool:
    return bool(sequence.stop_ids) and sequence.num_output < sequence.sampling.min_tokens


def _report(token: int, logprobs: Tensor, count: int | None) -> Sampled:
    values, tokens = logprobs.topk(min(count or 0, len(logprobs)))
    return Sampled(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
