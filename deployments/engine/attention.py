"""Attention over paged keys and values, for any transformers model that looks its attention up in `AttentionInterface`.

A step's new tokens stand in one row, all sequences one after the other: queries are `1 x H x T x D`. New keys and values are
written to their slots first, then each sequence reads its own back through its block table. Two shapes of work:

    decoders    one token each; sequences of like length form a group and are attended to at once, padded and masked
    prompts     a chunk of one sequence, causal from `start` on

This is the readable form, and the specification of every faster one. Shapes: T new tokens, B sequences of a group, W blocks,
H query heads, K key/value heads, G = H / K, D head size, L = W x block size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from deployments.engine.batch import Batch
from deployments.engine.finite import is_finite

NAME = "mmaas_paged"
CPU = torch.device("cpu")


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers. Masks are ours, so the model builds none."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """How one layer of a model asks for attention: the same in every step."""

    heads: int
    kv_heads: int
    head_size: int
    scale: float
    window: int | None
    softcap: float | None


Kernel = Callable[[Tensor, Tensor, Tensor, AttentionCall], Tensor]
"""`T x H x D` queries over a layer's pages of keys and values, in which the new ones are already, to `T x H x Dv`."""


class KvCache:
    """Keys and values of every layer, `num_slots x K x D` each. A layer's pages are made when it first writes: only the model
    knows the shape of its heads, and after sharding only the rank does."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.calls: dict[int, AttentionCall] = {}
        self.reads = 0  # by a layer of a step
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.reads += 1
        if index not in self._layers:
            slots = self.num_blocks * self.block_size
            self._layers[index] = tuple(x.new_zeros(slots, x.shape[1], x.shape[3]) for x in (key, value))  # type: ignore[assignment]
        return self._layers[index]

    def resize(self, num_blocks: int) -> None:
        """So many empty blocks; layers that have pages get new ones at once, in the place of the old."""
        old, self._layers, self.num_blocks = self._layers, {}, num_blocks
        for index in sorted(old):
            shapes = [(x.dtype, x.device, x.shape[1:]) for x in old.pop(index)]
            slots = num_blocks * self.block_size
            self._layers[index] = tuple(torch.zeros(slots, *shape, dtype=dtype, device=to) for dtype, to, shape in shapes)  # type: ignore[assignment]

    @property
    def num_bytes(self) -> int:
        return sum(x.nbytes for pair in self._layers.values() for x in pair)


@dataclass(slots=True)
class DecodeGroup:
    """Rows `first .. first + B` of the step, one token each."""

    first: int
    lengths: Tensor  # B: tokens to attend to, the new one included
    table: Tensor  # B*W blocks
    width: int  # L
    unwritten: Tensor  # slots of the B*L that hold nothing of these sequences, but perhaps numbers that aren't finite
    biases: dict[int | None, Tensor] = field(default_factory=dict)  # by sliding window, made when a layer asks

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """`B x 1 x 1 x L`: 0 where the token may look, -inf elsewhere."""
        if window not in self.biases:
            at = torch.arange(self.width, device=self.lengths.device)
            hidden = at >= self.lengths[:, None]
            if window is not None:
                hidden |= at < self.lengths[:, None] - window
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self.biases[window] = bias[:, None, None]
        return self.biases[window]


@dataclass(slots=True)
class PromptChunk:
    """Rows `first .. first + count` of the step: tokens `start ..` of one sequence."""

    first: int
    start: int
    count: int
    table: Tensor  # the blocks that hold the sequence so far, these tokens included
    biases: dict[int | None, Tensor | None] = field(default_factory=dict)

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """`count x (start + count)`; None where plain causal attention from 0 on says the same."""
        if window not in self.biases:
            end = self.start + self.count
            if self.start == 0 and (window is None or window >= end):
                self.biases[window] = None
            else:
                key = torch.arange(end, device=self.table.device)
                query = key[self.start :, None]
                hidden = key > query
                if window is not None:
                    hidden |= key <= query - window
                bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
                self.biases[window] = bias.masked_fill_(hidden, -torch.inf)
        return self.biases[window]


@dataclass(slots=True)
class Paged:
    """What the attention of one step needs beside queries, keys and values; the same for every layer."""

    cache: KvCache
    slots: Tensor  # T: where each new token's key and value go
    groups: list[DecodeGroup]
    chunks: list[PromptChunk]
    kernel: Kernel | None = None  # does the work of groups and chunks, which are empty then

    @classmethod
    def of(cls, batch: Batch, cache: KvCache, device: torch.device = CPU) -> Paged:
        size = cache.block_size
        positions = batch_positions(batch)
        rows = np.repeat(np.arange(len(batch.counts)), batch.counts)
        slots = batch.tables[rows, positions // size].astype(np.int64) * size + positions % size
        groups, chunks = list(_groups(batch, size, device)), list(_chunks(batch, size, device))
        return cls(cache, torch.from_numpy(slots).to(device), groups, chunks)


def batch_positions(batch: Batch) -> np.ndarray[Any, np.dtype[np.int64]]:
    """T: each new token's place in its sequence."""
    offsets = np.cumsum(batch.counts) - batch.counts
    return np.arange(len(batch.tokens)) - np.repeat(offsets - batch.starts, batch.counts)


def _groups(batch: Batch, size: int, device: torch.device) -> Iterator[DecodeGroup]:
    """Cut the decoders, which stand in order of length, wherever padding would exceed the group's shortest sequence."""
    num = int(np.argmax(batch.counts > 1)) if (batch.counts > 1).any() else len(batch.counts)
    widths = batch.starts[:num] // size + 1
    first = 0
    while first < num:
        last = int(np.searchsorted(widths, max(2 * widths[first], widths[first] + 8), side="right"))
        width = int(widths[last - 1])
        table = torch.from_numpy(batch.tables[first:last, :width].astype(np.int64).ravel())
        lengths = torch.from_numpy(batch.starts[first:last].astype(np.int64) + 1)
        unwritten = torch.arange(width * size) >= lengths[:, None]
        hidden = unwritten.flatten().nonzero()[:, 0]
        yield DecodeGroup(first, lengths.to(device), table.to(device), width * size, hidden.to(device))
        first = last


def _chunks(batch: Batch, size: int, device: torch.device) -> Iterator[PromptChunk]:
    first = 0
    for row, (start, count) in enumerate(zip(batch.starts.tolist(), batch.counts.tolist(), strict=True)):
        if count > 1:
            blocks = -(-(start + count) // size)
            table = torch.from_numpy(batch.tables[row, :blocks].astype(np.int64))
            yield PromptChunk(first, start, count, table.to(device))
        first += count


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    paged: Paged,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: `1 x H x T x D` queries and `1 x K x T x D` keys and values to `1 x T x H x D`."""
    keys, values = paged.cache.layer(module.layer_idx, key, value)  # type: ignore[arg-type]
    new_key, new_value = key[0].transpose(0, 1), value[0].transpose(0, 1)
    keys.index_copy_(0, paged.slots, new_key)
    values.index_copy_(0, paged.slots, new_value)
    queries = query[0].transpose(0, 1)  # T x H x D
    output = queries.new_empty(queries.shape[0], queries.shape[1], values.shape[2])
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    kv_heads, size = keys.shape[1], paged.cache.block_size
    if module.layer_idx not in paged.cache.calls:
        call = AttentionCall(queries.shape[1], kv_heads, queries.shape[2], scale, sliding_window, softcap)
        paged.cache.calls[module.layer_idx] = call  # type: ignore[index]
    if paged.kernel:
        return paged.kernel(queries, keys, values, paged.cache.calls[module.layer_idx])[None], None  # type: ignore[index]
    for group in paged.groups:
        rows = slice(group.first, group.first + len(group.lengths))
        q = queries[rows].reshape(len(group.lengths), kv_heads, -1, queries.shape[2])  # B x K x G x D
        k, v = (_read(pages, group.table, size).index_fill_(0, group.unwritten, 0) for pages in (keys, values))
        k, v = (x.view(-1, group.width, *x.shape[1:]) for x in (k, v))
        bias: Tensor | None = group.bias(sliding_window, q.dtype)
        output[rows] = _attend(q, k.transpose(1, 2), v.transpose(1, 2), bias, scale, softcap).flatten(1, 2)
    for chunk in paged.chunks:
        rows = slice(chunk.first, chunk.first + chunk.count)
        k, v = new_key[rows], new_value[rows]
        if chunk.start:
            k, v = (_read(pages, chunk.table, size)[: chunk.start + chunk.count] for pages in (keys, values))
        q, k, v = (x.transpose(0, 1)[None] for x in (queries[rows], k, v))  # 1 x heads x length x D
        bias = chunk.bias(sliding_window, q.dtype)
        output[rows] = _attend(q, k, v, bias, scale, softcap)[0].transpose(0, 1)
        if not is_finite(output[rows]):
            output[rows] = _attend_alone(q, k, v, sliding_window, scale, softcap)[0].transpose(0, 1)
    return output[None], None


def _attend_alone(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, softcap: float | None) -> Tensor:
    """As `_attend`, causal, row by row: what a row doesn't see isn't there, while a mask only gives it a weight of zero, which is
    NaN times what isn't finite. So tokens that stand before such a number stay sound, and may be shared."""
    rows, first = [], k.shape[2] - q.shape[2]
    for row in range(q.shape[2]):
        end = first + row + 1
        seen = slice(max(0, end - window) if window is not None else 0, end)
        bias = q.new_zeros(1, seen.stop - seen.start)
        rows.append(_attend(q[:, :, row : row + 1], k[:, :, seen], v[:, :, seen], bias, scale, softcap))
    return torch.cat(rows, 2)


def _read(pages: Tensor, table: Tensor, block_size: int) -> Tensor:
    """`len(table)*block_size x K x D`: whole blocks are copied, so that a read is a few long runs of memory."""
    blocks = pages.view(-1, block_size * pages.shape[1] * pages.shape[2])
    return blocks.index_select(0, table).view(-1, *pages.shape[1:])


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """`B x H x Q x D` queries over `B x K x L x D`; bias None means causal."""
    if softcap is None:
        grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None, scale=scale, enable_gqa=grouped)
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = torch.tanh(q @ k.transpose(2, 3) * (scale / softcap)) * softcap
    if bias is None:
        bias = torch.full(scores.shape[2:], -torch.inf, dtype=scores.dtype, device=scores.device).triu_(1)
    return torch.softmax((scores + bias).float(), -1).to(v.dtype) @ v
