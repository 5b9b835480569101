"""The kernel's door with plain arithmetic behind it: for tests of everything around the kernel, where no Triton is."""

from __future__ import annotations

import torch
from torch import Tensor

from deployments.engine.attention import AttentionCall
from deployments.engine.gpu.inputs import Step


def attend(queries: Tensor, keys: Tensor, values: Tensor, call: AttentionCall, step: Step) -> Tensor:
    """Program by program, as the launches name them."""
    output = queries.new_full((queries.shape[0], call.heads, values.shape[2]), torch.nan)
    for launch in step.launches:
        for sequence, begin in step.programs[launch.first : launch.first + launch.count].tolist():
            count = min(launch.tokens_each, int(step.counts[sequence]) - begin)
            first, start = int(step.firsts[sequence]) + begin, int(step.starts[sequence]) + begin
            at = torch.arange(start + count)
            slots = step.tables[sequence][at // step.block_size] * step.block_size + at % step.block_size
            shared = call.heads // call.kv_heads
            key, value = (pages[slots].repeat_interleave(shared, 1) for pages in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", queries[first : first + count], key) * call.scale
            scores = torch.tanh(scores / call.softcap) * call.softcap if call.softcap else scores
            distance = torch.arange(start, start + count)[:, None] - at
            scores = scores.masked_fill((distance < 0) | (distance >= (call.window or 1 << 30)), -torch.inf)
            output[first : first + count] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
    return output
