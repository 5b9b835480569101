"""How AutoTP cuts a model, parameter by parameter, read off a model without weights. Knows geometry, reads no file.

DeepSpeed leaves a note on every parameter that it cut, so that its checkpoints can be put together again: for each rank, which
blocks of the whole tensor went where (`deepspeed/checkpoint/affine.py`). That note is the decision itself, for fused matrices
too; what has none was left whole. Anything that doesn't add up is `CutUnknown`, and the caller cuts the loaded model instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
Box = tuple[slice, ...]
"""A block of a tensor: one slice for each dimension."""


class CutUnknown(Exception):
    """DeepSpeed's cut of a model can't be learned from its notes; the message says why."""


@dataclass(frozen=True, slots=True)
class Cut:
    """This rank's part of one parameter: blocks of the whole tensor, and where they lie in the part."""

    whole: Shape
    part: Shape
    blocks: tuple[tuple[Box, Box], ...]  # of the whole, of the part

    @classmethod
    def none(cls, shape: Shape) -> Cut:
        """The rank holds the whole tensor."""
        everything = tuple(slice(0, size) for size in shape)
        return cls(shape, shape, ((everything, everything),))

    @property
    def num_elements(self) -> int:
        return math.prod(self.part)

    def take(self, whole: Tensor, dtype: torch.dtype, *, pinned: bool = False) -> Tensor:
        """A new tensor with this part of `whole`, which may lie in a mapped file: only the blocks are touched."""
        part = torch.empty(self.part, dtype=dtype, pin_memory=pinned)
        for source, target in self.blocks:
            part[target].copy_(whole[source])
        return part


def learn(model: nn.Module, before: Mapping[str, Shape], rank: int) -> dict[str, Cut]:
    """Every parameter's cut. `model` has been through AutoTP on the meta device, `before` are its shapes before that.

    Raises CutUnknown where DeepSpeed's notes are missing or don't match what it did.
    """
    after = model.state_dict(keep_vars=True)
    if after.keys() != before.keys():
        raise CutUnknown(f"AutoTP renamed {sorted(after.keys() ^ before.keys())[:3]}")
    cuts = {name: _cut(name, tensor, before[name], rank) for name, tensor in after.items()}
    for name, cut in cuts.items():
        if cut.part != tuple(after[name].shape):
            raise CutUnknown(f"AutoTP gave {name} the shape {tuple(after[name].shape)}, its note says {cut.part}")
    return cuts


def _cut(name: str, tensor: Tensor, whole: Shape, rank: int) -> Cut:
    from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META

    note = getattr(tensor, DS_AUTOTP_UC_META, None)
    if note is None:
        return Cut.none(whole)
    blocks = note["conversion"].get("affine_map")
    if blocks is None:
        raise CutUnknown(f"AutoTP can't describe its cut of {name}: {note['conversion'].get('unsupported_reason')}")
    if tuple(blocks["logical_shape"]) != whole:
        raise CutUnknown(f"AutoTP's note on {name} is about a tensor of shape {blocks['logical_shape']}, not {whole}")
    mine = blocks["ranks"][rank]
    part = tuple(mine["shard_shape"])
    return Cut(whole, part, _blocks(name, mine["pieces"], whole, part))


def _blocks(name: str, pieces: Sequence[Mapping[str, Any]], whole: Shape, part: Shape) -> tuple[tuple[Box, Box], ...]:
    pieces = [piece for piece in pieces if math.prod(piece["shape"])]  # columns are dealt out by 64: a rank may get none
    blocks = tuple((_box(piece["source"], piece["shape"], whole), _box(piece["dest"], piece["shape"], part)) for piece in pieces)
    if any(piece.get("scale", 1.0) != 1.0 for piece in pieces):
        raise CutUnknown(f"AutoTP scales a part of {name}")
    if any(source is None or target is None for source, target in blocks):
        raise CutUnknown(f"AutoTP's part of {name} is not made of blocks")
    if sum(math.prod(piece["shape"]) for piece in pieces) != math.prod(part):
        raise CutUnknown(f"AutoTP's note on {name} doesn't account for all of the part")
    return blocks  # type: ignore[return-value]


def _box(place: tuple[int, Sequence[int]], size: Sequence[int], shape: Shape) -> Box | None:
    """The block of `size` (not empty) at a flat offset in a dense tensor of `shape`; None when it is no block."""
    offset, strides = place
    box = []
    for length, stride, dense, limit in zip(size, strides, _strides(shape), shape, strict=True):
        start, offset = divmod(offset, dense)
        if (length > 1 and stride != dense) or start + length > limit:
            return None
        box.append(slice(start, start + length))
    return None if offset else tuple(box)


def _strides(shape: Shape) -> list[int]:
    """Of a dense tensor."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
