"""From a model loaded on a GPU to a runner that may serve: proven against the readable form, its cache planned, its graphs made."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from cluster.errors import ModelNotServable
from deployments.engine.attention import KvCache
from deployments.engine.gpu.buckets import sizes
from deployments.engine.gpu.memory import blocks_that_fit
from deployments.engine.gpu.runner import DeviceRunner, synchronise
from deployments.engine.gpu.static import Graphs, StaticDecode, why_not
from deployments.engine.runner import TOLERANCE, Runner

if TYPE_CHECKING:
    from deployments.engine.group import Group
    from deployments.engine.shard_spec import ShardSpec

log = logging.getLogger(__name__)

PROBED = 32
"""Blocks of the first, small cache, which only probes write to: enough for theirs, however small a block is."""


def gpu_runner(model: nn.Module, spec: ShardSpec, device: torch.device, group: Group | None) -> tuple[StaticDecode | Runner, int]:
    """Also the number of blocks, the same on every rank. Raises ModelNotServable for a model that a kernel gets wrong, or that
    leaves no room for its cache."""
    settings, info = spec.settings, spec.model
    torch.set_float32_matmul_precision("highest")  # who asks for float32 wants it exact
    cache = KvCache(PROBED, settings.block_size)
    if settings.runner == "torch":
        runner = Runner(model, cache, device=device)
        runner.check()
        return runner, _planned(runner, spec, device, group, graphs=False)
    from deployments.engine.gpu.kernel import attend

    ranks = group.size if group else 1
    own, shared = max(1, info.num_kv_heads // ranks), info.num_heads // info.num_kv_heads
    paged = DeviceRunner(model, cache, device, attend, group=shared, kv_heads=own)
    paged.check()
    error = paged.error()
    if not _agree(group, error < max(TOLERANCE[model.dtype], paged.slack)):  # type: ignore[index]
        why = f"the attention kernel gives other logits (relative error {error:.2g}); engine.runner=torch does without it"
        raise ModelNotServable(f"{spec.directory.name}: {why}")
    reason = "engine.cuda_graphs=false" if settings.cuda_graphs is False else why_not(model.config.to_dict())  # type: ignore[union-attr, operator]
    if reason and settings.cuda_graphs:
        raise ModelNotServable(f"{spec.directory.name}: engine.cuda_graphs=true, but {reason}")
    num_blocks = _planned(paged, spec, device, group, graphs=reason is None)
    if reason:
        log.info("steps are launched one kernel at a time", extra={"reason": reason})
        return paged, num_blocks
    width = -(-info.max_model_len // settings.block_size)
    static = StaticDecode(paged, sizes(settings.max_sequences), width, Graphs())
    static.prepare()
    return static, num_blocks


def _planned(runner: Runner, spec: ShardSpec, device: torch.device, group: Group | None, *, graphs: bool) -> int:
    """Measure the largest step, then give the rest of the memory to the cache."""
    settings, info = spec.settings, spec.model
    per_block = runner.cache.num_bytes // runner.cache.num_blocks
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    runner.rehearse(min(settings.max_batch_tokens, info.max_model_len), settings.max_sequences)
    step = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    fit = blocks_that_fit(free=free, total=total, share=settings.gpu_memory, step=step, graphs=graphs, block=per_block)
    longest = -(-info.max_model_len // settings.block_size)
    num_blocks = spec.num_blocks if spec.exactly else min(fit, longest * settings.max_sequences)
    num_blocks = group.smallest(num_blocks) if group else num_blocks
    if num_blocks < 1 or fit < num_blocks:
        raise ModelNotServable(
            f"{spec.directory.name} leaves no room for keys and values on a GPU of {total >> 20} MiB, {free >> 20} of them free: "
            "raise --tp or engine.gpu_memory, lower engine.max_batch_tokens, or free the GPU"
        )
    runner.resize(num_blocks)
    synchronise(device)
    log.info("memory planned", extra={"blocks": num_blocks, "block_bytes": per_block, "step_bytes": step, "free_bytes": free})
    return num_blocks


def _agree(group: Group | None, mine: bool) -> bool:
    return group.all_agree(mine) if group else mine
