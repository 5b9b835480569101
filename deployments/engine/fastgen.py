"""DeepSpeed FastGen (inference v2) behind the engine's door: the few families that it has kernels for, on one GPU.

FastGen keeps keys and values by names of its own and gives only a sequence's last logits, so there is no prefix cache and no
guessing. Our blocks are only counted: each stands for one of FastGen's, and tells which sequence a row of a batch belongs to.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cluster.errors import ModelNotServable
from deployments.engine.adapters import WithoutAdapters
from deployments.engine.batch import Batch
from deployments.engine.checkpoint import kv_heads
from deployments.engine.model_config import read_json, rope_types

if TYPE_CHECKING:
    from deployments.engine.shard_spec import ShardSpec

log = logging.getLogger(__name__)

POLICIES = {
    "exaone4": "Exaone4Policy",
    "llama": "Llama2Policy",
    "mistral": "MistralPolicy",
    "mixtral": "MixtralPolicy",
    "opt": "OPTPolicy",
    "phi": "PhiPolicy",
    "phi3": "Phi3Policy",
    "qwen2": "Qwen2Policy",
    "qwen2_moe": "Qwen2MoePolicy",
}
"""Families by `model_type`, and DeepSpeed's class that knows how to build them."""
HEAD_SIZES = (64, 80, 96, 128)
GROUPS = (1, 2, 4, 5, 6, 7, 8, 16, 29, 35, 36, 71)
"""What the rotary kernel is compiled for (`deepspeed/inference/v2/kernels/ragged_ops/linear_blocked_kv_rotary`)."""
SEQUENCES = 1 << 14
"""That FastGen can know at once: those that have ended, too, until others want their blocks. So there are no more blocks either."""


def why_not(config: Mapping[str, Any], *, dtype: str, tp: int, max_model_len: int) -> str | None:
    """What rules FastGen out for a model's config.json, in words; None when nothing does."""
    kind = config.get("model_type")
    if kind not in POLICIES:
        return f"it has no kernels for models of type {kind!r:.40}, only for {', '.join(POLICIES)}"
    if tp > 1:
        return "several shards through it are not built here: use tp=1"
    if dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 and float16, not in {dtype}"
    if scaled := sorted(rope_types(config) - {"default"}):
        return f"it would drop the scaling of rotary embeddings ({scaled[0]})"
    heads = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or config["hidden_size"] // heads)
    if size not in HEAD_SIZES or size * heads != config["hidden_size"]:
        return f"it has no kernels for {heads} heads of {size} over a hidden size of {config['hidden_size']}"
    if heads // kv_heads(config) not in GROUPS:
        return f"it has no kernels for {heads // kv_heads(config)} query heads to a key/value head"
    return _left_out(config, max_model_len)


def _left_out(config: Mapping[str, Any], max_model_len: int) -> str | None:
    """What it would compute as if it weren't there."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and window < max_model_len:
        return f"it knows no sliding window ({window} tokens of {max_model_len}); a smaller max_model_len would do"
    if config.get("tie_word_embeddings") and config["model_type"] not in ("qwen2", "opt"):
        return "it can't tie the output to the embeddings for this family"
    if config["model_type"] == "llama" and (config.get("attention_bias") or config.get("mlp_bias")):
        return "it leaves out the biases of this model"
    return None


class Owners:
    """Which sequence holds which block, learned from the batches alone: nobody says when a sequence has ended, but its blocks then
    turn up with others."""

    def __init__(self) -> None:
        self._names = itertools.count()
        self._owner: dict[int, int] = {}
        self._blocks: dict[int, set[int]] = {}

    def claim(self, batch: Batch, block_size: int) -> tuple[list[int], list[int]]:
        """The name of each row's sequence, and names of sequences that are known to have ended."""
        names: list[int] = []
        ended: list[int] = []
        for table, start, count in zip(batch.tables, batch.starts.tolist(), batch.counts.tolist(), strict=True):
            blocks = table[: -(-(start + count) // block_size)].tolist()
            name = self._owner[blocks[0]] if start else next(self._names)  # one that was preempted begins anew
            for former in {self._owner.get(block, name) for block in blocks} - {name}:
                ended.append(former)
                for block in self._blocks.pop(former):
                    del self._owner[block]
            self._blocks[name] = set(blocks)
            self._owner.update(dict.fromkeys(blocks, name))
            names.append(name)
        return names, ended


class FastGen(WithoutAdapters):
    """The runner. `engine` is DeepSpeed's `InferenceEngineV2`, or what has its `put` and `flush`."""

    def __init__(self, engine: Any, spec: ShardSpec) -> None:
        self.engine, self.spec = engine, spec
        self._owners = Owners()

    @classmethod
    def load(cls, spec: ShardSpec, device: torch.device) -> FastGen:
        """Raises ModelNotServable, with what to change, for what FastGen can't serve here."""
        config = read_json(spec.directory / "config.json")
        tp, dtype, length = spec.rendezvous.size, spec.model.dtype, spec.model.max_model_len
        reason = why_not(config, dtype=dtype, tp=tp, max_model_len=length)
        if reason is None and device.type != "cuda":
            reason = "it needs a GPU, and this shard has none"
        if reason:
            raise ModelNotServable(
                f"{spec.directory.name}: engine.runner=fastgen, but {reason}; engine.runner=auto does without it"
            )
        try:
            engine = _engine(spec, device)
        except (ImportError, ValueError, RuntimeError, AssertionError) as error:
            raise ModelNotServable(f"{spec.directory.name}: FastGen can't serve it: {error}; engine.runner=auto") from error
        size = int(engine.model().kv_cache_config()[0].block_size)
        if size != spec.settings.block_size:
            raise ModelNotServable(f"engine.runner=fastgen needs engine.block_size={size} for heads of this size")
        settings = spec.settings.model_copy(update={"prefix_cache": False, "speculation": 0})
        log.info("runs through FastGen, without prefix cache and guesses")
        return cls(engine, replace(spec, settings=settings, num_blocks=min(int(engine.free_blocks[0]), SEQUENCES)))

    def run(self, batch: Batch) -> Tensor:
        """`R x V` logits on the device, one row for each of `batch.sampled`."""
        names, ended = self._owners.claim(batch, self.spec.settings.block_size)
        for name in ended:
            self.engine.flush(name)
        tokens = torch.split(torch.from_numpy(batch.tokens.astype(np.int64)), batch.counts.tolist())
        logits: Tensor = self.engine.put(names, tokens)
        assert len(set(batch.sampled.tolist())) == len(batch.sampled), "only a sequence's last logits are there"
        return logits[torch.from_numpy(batch.sampled.astype(np.int64)).to(logits.device)]

    @property
    def weight_bytes(self) -> int:
        return self.spec.model.weight_bytes

    def close(self) -> None:
        """Nothing to end."""


def _engine(spec: ShardSpec, device: torch.device) -> Any:
    """Built in this process from safetensors. DeepSpeed's own factory would unpickle a file that it finds beside them."""
    os.environ |= {"DS_ACCELERATOR": "cuda", "LOCAL_RANK": str(device.index or 0), "RANK": "0", "WORLD_SIZE": "1"}
    import torch.distributed as dist

    torch.cuda.set_device(device)
    if not dist.is_initialized():  # else DeepSpeed opens a port for its group of one
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    from deepspeed.inference.v2 import model_implementations
    from deepspeed.inference.v2.config_v2 import RaggedInferenceEngineConfig
    from deepspeed.inference.v2.engine_v2 import InferenceEngineV2

    checkpoint = _checkpoint(spec.directory, spec.model.dtype)
    policy = getattr(model_implementations, POLICIES[spec.model.model_type])(checkpoint.model_config, checkpoint_engine=checkpoint)
    total = torch.cuda.get_device_properties(device).total_memory
    spare = {"mode": "reserve", "size": int((1 - spec.settings.gpu_memory) * total)}
    exact = {"mode": "allocate", "size": spec.num_blocks}
    tokens = max(spec.settings.max_batch_tokens, spec.settings.max_sequences)
    manager = {
        "max_tracked_sequences": SEQUENCES,
        "max_ragged_batch_size": tokens,
        "max_ragged_sequence_count": min(spec.settings.max_sequences, tokens),
        "max_context": spec.model.max_model_len,
        "memory_config": exact if spec.exactly else spare,
    }
    return InferenceEngineV2(policy, RaggedInferenceEngineConfig(tensor_parallel={"tp_size": 1}, state_manager=manager))


def _checkpoint(directory: Path, dtype: str) -> Any:
    from deepspeed.inference.v2.checkpoint import HuggingFaceCheckpointEngine

    checkpoint = HuggingFaceCheckpointEngine(str(directory), local_files_only=True, trust_remote_code=False)
    checkpoint.model_config.dtype = getattr(torch, dtype)
    return checkpoint
