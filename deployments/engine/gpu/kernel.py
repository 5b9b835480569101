"""Attention over pages as Triton kernels: decoders, chunks of prompts and guesses alike. `attention.py` is the specification.

A program is one piece of a sequence's new tokens under one key/value head, and walks through the sequence's pages with a running
softmax (FlashAttention: Dao 2022). All query heads that share the key/value head stand in the program's rows, so that a page is
read once for all of them. Where there are too few programs to fill a GPU, each one's pages are dealt out to `splits` programs, and
a second kernel puts their parts together (Flash-Decoding: Dao 2023).

Runs on CPUs too, slowly: with TRITON_INTERPRET=1 in the environment before Triton is imported.
"""

# The names in this module's kernels are theirs: Triton compiles their source and knows no type hints.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, operator, import-not-found, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.engine.attention import AttentionCall
from deployments.engine.gpu.inputs import Launch, Step

NEVER = 1 << 30
"""A window that hides nothing."""
TILE_BYTES = 16384
"""Of keys, and of values, that a program takes at once: two of each must fit into the chip's shared memory."""


VIEWS = ["programs", "firsts", "starts", "counts", "tables"]
VARYING = ["table_stride", "tokens"]
"""What differs from step to step must not have Triton compile anew: where a view begins, and sizes."""


def attend(queries: Tensor, keys: Tensor, values: Tensor, call: AttentionCall, step: Step) -> Tensor:
    """`T x H x D` queries over pages of `slots x K x D` to `T x H x Dv`. The new keys and values are in the pages already."""
    output = queries.new_empty(queries.shape[0], call.heads, values.shape[2])
    for launch in step.launches:
        _launch(queries, keys, values, output, call, step, launch)
    return output


def _launch(queries: Tensor, keys: Tensor, values: Tensor, output: Tensor, call: AttentionCall, step: Step, launch: Launch) -> None:
    tokens, heads, width = output.shape
    group = heads // call.kv_heads
    block_d = max(16, triton.next_power_of_2(max(queries.shape[2], width)))
    splits = launch.splits
    parts = (splits, tokens, heads) if splits > 1 else (1, 1, 1)
    sums = torch.empty(*parts, width, dtype=torch.float32, device=queries.device)
    scales = torch.empty(2, *parts, dtype=torch.float32, device=queries.device)
    _attend[(launch.count, call.kv_heads, splits)](
        *(queries, keys, values, output, sums, scales),
        *(step.programs[launch.first :], step.firsts, step.starts, step.counts, step.tables),
        *(queries.stride(0), queries.stride(1), keys.stride(0), values.stride(0), step.tables.stride(0)),
        *(tokens, heads, call.scale, call.softcap or 0.0, call.window or NEVER),
        GROUP=group,
        D=queries.shape[2],
        DV=width,
        BLOCK_SIZE=step.block_size,
        QUERIES=launch.tokens_each,
        ROWS=max(16, triton.next_power_of_2(launch.tokens_each * group)),
        COLUMNS=max(16, min(64, TILE_BYTES // (block_d * keys.element_size()))),
        BLOCK_D=block_d,
        CAPPED=call.softcap is not None,
        SPLITS=splits,
        num_warps=4 if launch.tokens_each == 1 else 8,
    )
    if splits > 1:
        _combine[(launch.count * launch.tokens_each, heads)](
            *(output, sums, scales, step.programs[launch.first :], step.firsts, step.counts, tokens, heads),
            DV=width,
            BLOCK_D=block_d,
            QUERIES=launch.tokens_each,
            SPLITS=splits,
        )


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=VIEWS)
def _attend(
    queries,
    keys,
    values,
    output,
    sums,
    scales,
    programs,
    firsts,
    starts,
    counts,
    tables,
    query_stride,
    head_stride,
    key_stride,
    value_stride,
    table_stride,
    tokens,
    heads,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAPPED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    kv_head, split = tl.program_id(1), tl.program_id(2)
    sequence = tl.load(programs + 2 * tl.program_id(0))
    begin = tl.load(programs + 2 * tl.program_id(0) + 1)
    start, count = tl.load(starts + sequence), tl.load(counts + sequence)

    # The rows: token after token, for each the query heads of this key/value head.
    row = tl.arange(0, ROWS)
    place = begin + row // GROUP
    valid = (row < QUERIES * GROUP) & (place < count)
    token = (tl.load(firsts + sequence) + place).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    position = start + place
    d = tl.arange(0, BLOCK_D)
    query = tl.load(
        queries + token[:, None] * query_stride + head[:, None] * head_stride + d[None, :],
        mask=valid[:, None] & (d[None, :] < D),
        other=0.0,
    )

    # What any of the rows may see, and this split's share of it.
    end = start + tl.minimum(begin + QUERIES, count)
    low = tl.maximum(start + begin - window + 1, 0) // COLUMNS * COLUMNS
    share = tl.cdiv(tl.cdiv(end - low, SPLITS), COLUMNS) * COLUMNS
    low += split * share
    end = tl.minimum(end, low + share)

    most = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(low, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < end
        block = tl.load(tables + sequence * table_stride + column // BLOCK_SIZE, mask=inside, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + column % BLOCK_SIZE
        key = tl.load(
            keys + slot[None, :] * key_stride + kv_head * D + d[:, None],
            mask=inside[None, :] & (d[:, None] < D),
            other=0.0,
        )
        score = tl.dot(query, key, input_precision="ieee") * scale
        if CAPPED:
            score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)  # tanh
        distance = position[:, None] - column[None, :]
        score = tl.where(inside[None, :] & (distance >= 0) & (distance < window), score, -float("inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        finite = tl.where(higher == -float("inf"), 0.0, higher)  # a row that has seen nothing yet
        weight = tl.exp(score - finite[:, None])
        faded = tl.exp(most - finite)
        value = tl.load(
            values + slot[:, None] * value_stride + kv_head * DV + d[None, :],
            mask=inside[:, None] & (d[None, :] < DV),
            other=0.0,
        )
        total = total * faded + tl.sum(weight, 1)
        mixed = mixed * faded[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        most = higher

    target = token * heads + head
    if SPLITS == 1:
        answer = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
        place_of = output + target[:, None] * DV + d[None, :]
        tl.store(place_of, answer.to(output.dtype.element_ty), mask=valid[:, None] & (d[None, :] < DV))
    else:
        target += split.to(tl.int64) * tokens * heads
        tl.store(sums + target[:, None] * DV + d[None, :], mixed, mask=valid[:, None] & (d[None, :] < DV))
        tl.store(scales + target, most, mask=valid)
        tl.store(scales + target + SPLITS * tokens * heads, total, mask=valid)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["programs", "firsts", "counts"])
def _combine(
    output,
    sums,
    scales,
    programs,
    firsts,
    counts,
    tokens,
    heads,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One token and query head: the splits' sums, each as far from the largest score as it is."""
    sequence = tl.load(programs + tl.program_id(0) // QUERIES * 2)
    place = tl.load(programs + tl.program_id(0) // QUERIES * 2 + 1) + tl.program_id(0) % QUERIES
    if place < tl.load(counts + sequence):
        target = (tl.load(firsts + sequence) + place).to(tl.int64) * heads + tl.program_id(1)
        split = tl.arange(0, SPLITS)
        d = tl.arange(0, BLOCK_D)
        parts = split.to(tl.int64) * tokens * heads + target
        most = tl.load(scales + parts)
        total = tl.load(scales + parts + SPLITS * tokens * heads)
        weight = tl.exp(most - tl.max(most, 0))
        part = tl.load(sums + parts[:, None] * DV + d[None, :], mask=d[None, :] < DV, other=0.0)
        answer = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
        tl.store(output + target * DV + d, answer.to(output.dtype.element_ty), mask=d < DV)
