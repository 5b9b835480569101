"""Weights in the order in which the decoder reads them: panels of 32 outputs, one after the other (`linear.h`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

PANEL = 32
LANE_BYTES = 4
ALIGNMENT = 64


class CMatrix(ctypes.Structure):
    """`Matrix` of linear.h."""

    _fields_ = [
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("num_panels", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
    ]


class Arena:
    """One run of memory for all packed weights, for the kernel to back with huge pages. Filled once, never freed in part."""

    def __init__(self, num_bytes: int) -> None:
        self._memory = torch.from_numpy(np.empty(num_bytes + ALIGNMENT, np.uint8))  # numpy asks for huge pages
        self._next = -self._memory.data_ptr() % ALIGNMENT

    @property
    def num_bytes(self) -> int:
        return len(self._memory)

    def take(self, num_bytes: int) -> Tensor:
        start = self._next
        self._next += _aligned(num_bytes)
        assert self._next <= len(self._memory), "more weights than were announced"
        return self._memory[start : start + num_bytes]


def declare(library: ctypes.CDLL) -> None:
    """Of packing.cpp."""
    library.mmaas_pack.restype = None
    library.mmaas_pack.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32]


def packed_bytes(outputs: int, inputs: int, itemsize: int) -> int:
    """What `pack` takes from the arena."""
    return _aligned(-(-outputs // PANEL) * PANEL * inputs * itemsize)


def pack(weight: Tensor, arena: Arena, library: ctypes.CDLL, threads: int) -> Tensor:
    """`n x k` weights as `ceil(n/32) x k/per x 32 x per`, where `per` numbers fill 32 bits; missing outputs are zero."""
    outputs, inputs = weight.shape
    panels = -(-outputs // PANEL)
    lanes = weight.contiguous().view(torch.int32)
    packed = arena.take(panels * PANEL * inputs * weight.element_size()).view(torch.int32).view(panels, lanes.shape[1], PANEL)
    library.mmaas_pack(lanes.data_ptr(), outputs, lanes.shape[1], packed.data_ptr(), threads)
    return packed


def unsigned(weight: Tensor) -> Tensor:
    """Integers of eight bits as the decoder keeps them (`int8.h`): 128 more."""
    return weight ^ -128


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Gates and what they gate, 16 rows of each by turns, so that a panel holds both: `n` rows each become `2n`, n rounded up."""
    half = PANEL // 2
    gate, up = (torch.nn.functional.pad(part, (0, 0) * (part.dim() - 1) + (0, -len(part) % half)) for part in (gate, up))
    return torch.stack([part.reshape(-1, half, *part.shape[1:]) for part in (gate, up)], 1).flatten(0, 2)


def padded(numbers: Tensor | None, outputs: int) -> Tensor | None:
    """Biases or scales, float32, filled up to whole panels."""
    return None if numbers is None else torch.nn.functional.pad(numbers.float(), (0, -outputs % PANEL)).contiguous()


def joined(parts: Items[Tensor | None], sizes: Items[int]) -> Tensor | None:
    """Biases of fused matrices, one after the other; None when no part has one."""
    if all(part is None for part in parts):
        return None
    return torch.cat([torch.zeros(size) if part is None else part.float() for part, size in zip(parts, sizes, strict=True)])


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
