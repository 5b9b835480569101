"""One rank's model: takes a `Batch`, runs it, returns logits. Knows nothing of requests, sampling or other ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cluster.errors import ModelNotServable
from deployments.engine import attention
from deployments.engine.adapted import Adapted
from deployments.engine.adapters import AdapterPart
from deployments.engine.attention import CPU, KvCache, Paged, batch_positions
from deployments.engine.batch import Batch
from deployments.engine.handover import Handover
from deployments.engine.stage import entrance_of, exit_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
"""Largest difference of two ways to the same logits, relative to the largest logit. A wrong mask or position is far beyond."""

QUANTIZED_TOLERANCE = 0.25
"""With weights in eight bits. Where two ways fall on different sides of a rounding, they differ by what rounding costs."""


def load_model(directory: Path, dtype: str) -> nn.Module:
    """The whole model on this rank, from safetensors alone: no pickle, no remote code, no network.

    The directory has passed `checkpoint.inspect`. Raises ModelNotServable when weights are missing or have other shapes.
    """
    from transformers import AutoModelForCausalLM

    attention.register()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=DTYPES[dtype],
            attn_implementation=attention.NAME,
            use_safetensors=True,
            weights_only=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (KeyError, ValueError) as error:
        raise ModelNotServable(f"{directory.name}: transformers can't build this model with paged attention: {error!r}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelNotServable(f"{directory.name}: the weights lack {', '.join(missing[:5])} ({len(missing)} tensors in all)")
    return model.eval()  # type: ignore[no-any-return]


class Runner:
    """Owns the model and its KV cache. `handover` is there where the model is one stage of several."""

    def __init__(
        self,
        model: nn.Module,
        cache: KvCache,
        handover: Handover | None = None,
        all_reduce: Callable[[Tensor], None] | None = None,
        device: torch.device = CPU,
    ) -> None:
        """`all_reduce`: sums over the ranks that share a layer, which adapters of layers that are summed need; None: this one has
        whole layers."""
        self.model = model
        self.cache = cache
        self.handover = handover
        self.device = device
        self._entrance, self._exit = entrance_of(model), exit_of(model)
        self._width = model.config.get_text_config().hidden_size  # type: ignore[operator, union-attr]
        self._adapted = Adapted(model, all_reduce)

    @property
    def ticks(self) -> float:
        """Grows within a step, layer by layer."""
        return self.cache.reads

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """`R x V` logits, one row for each of `batch.sampled`; in a stage before the last, `R x H` of its hidden states."""
        self._adapted.begin(batch)
        if self._entrance:
            assert self.handover, "a stage needs somebody to get hidden states from"
            hidden = self.handover.take(len(batch.tokens), self._width, self.model.dtype)  # type: ignore[arg-type]
            self._entrance.stream = hidden[None]
        output = self.model(
            input_ids=torch.from_numpy(batch.tokens.astype(np.int64))[None].to(self.device),
            position_ids=torch.from_numpy(batch_positions(batch))[None].to(self.device),
            use_cache=False,
            logits_to_keep=torch.from_numpy(batch.rows).to(self.device),
            paged=Paged.of(batch, self.cache, self.device),
        )
        if self._exit:
            assert self.handover, "a stage needs somebody to give hidden states to"
            assert self._exit.stream is not None, "the model left a layer out"
            hidden = self._exit.stream[0]
            self.handover.give(hidden)
            return hidden[torch.from_numpy(batch.rows)]
        return output.logits[0]  # type: ignore[no-any-return]

    def rehearse(self, tokens: int, rows: int) -> None:
        """The largest step there will be, on one block: what it takes beside weights and cache shows in the allocator's peak."""
        table = np.zeros((1, -(-tokens // self.cache.block_size)), np.int32)
        counts, sampled = np.array([tokens], np.int32), np.zeros(min(rows, tokens), np.int32)
        self.run(Batch(np.ones(tokens, np.int32), np.zeros(1, np.int32), counts, sampled, table))

    def resize(self, num_blocks: int) -> None:
        """Another cache, of so many blocks; what was in the old one is lost."""
        self.cache.resize(num_blocks)

    def check(self) -> None:
        """Prove that this model can be paged: two sequences that grow in one batch must get the logits that one has alone.

        Also allocates the cache. Raises ModelNotServable for a model that builds its own masks, counts positions by itself or
        doesn't ask transformers' attention interface.
        """
        alone = _probe([1, 2, 3, 4], start=0, table=[0]), _probe([5, 6, 7], start=0, table=[1])
        parts = _probe([1, 2, 3], start=0, table=[2]), _probe([5, 6], start=0, table=[3])
        ends = _probe([4], start=3, table=[2]), _probe([7], start=2, table=[3])
        try:
            whole = torch.cat([self.run(batch) for batch in alone])
            self.run(_merge(parts))
            paged = self.run(_merge(ends))
        except (TypeError, KeyError, AttributeError) as error:
            raise ModelNotServable(f"{self._name} doesn't use transformers' attention interface: {error!r}") from error
        difference = float((whole - paged).abs().max() / whole.abs().max().clamp_min(1e-6))
        if not difference < max(TOLERANCE[whole.dtype], self.slack):
            raise ModelNotServable(f"{self._name} gives other logits when its cache is paged (relative error {difference:.2g})")

    def pack_adapter(self, part: AdapterPart) -> AdapterPart:
        return part

    def put_adapter(self, slot: int, packed: AdapterPart | None) -> None:
        self._adapted.put(slot, packed)

    @property
    def slack(self) -> float:
        """The least tolerance that this model needs, whatever its type."""
        return QUANTIZED_TOLERANCE if any(parameter.dtype.itemsize == 1 for parameter in self.model.parameters()) else 0.0

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def close(self) -> None:
        """Nothing to end: torch's threads are the process's."""

    @property
    def _name(self) -> str:
        return type(self.model).__name__


def _probe(tokens: list[int], *, start: int, table: list[int]) -> Batch:
    one, last = np.array([len(tokens)], np.int32), np.zeros(1, np.int32)
    return Batch(np.array(tokens, np.int32), np.array([start], np.int32), one, last, np.array([table], np.int32))


def _merge(batches: tuple[Batch, Batch]) -> Batch:
    return Batch(
        np.concatenate([batch.tokens for batch in batches]),
        np.concatenate([batch.starts for batch in batches]),
        np.concatenate([batch.counts for batch in batches]),
        np.arange(2, dtype=np.int32),
        np.concatenate([batch.tables for batch in batches]),
    )
