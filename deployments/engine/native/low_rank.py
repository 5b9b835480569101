"""Adapters in the order in which the decoder reads them (`low_rank.h`): one `Delta` for each of a layer's four products."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from deployments.engine.adapters import AdapterPart
from deployments.engine.native.description import LayerDescription
from deployments.engine.native.packing import PANEL, Arena, interleave, pack, packed_bytes

COLUMNS = 4
"""Ranks are filled up to a multiple of this."""


class CDelta(ctypes.Structure):
    """`Delta` of low_rank.h."""

    _fields_ = [
        ("down", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("depth", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


@dataclass(frozen=True)
class Product:
    """One of the decoder's matrices: the linears that are fused in it, with the outputs that this rank has of each."""

    linears: tuple[str, ...]
    outputs: tuple[int, ...]
    inputs: int  # as the decoder has them, filled up
    gated: bool = False

    def joined(self, parts: Items[Tensor]) -> Tensor:
        """One tensor for each linear, put together as the matrix is."""
        if not self.gated:
            return torch.cat(list(parts))
        return interleave(*(parts[0].chunk(2) if len(parts) == 1 else parts))


def products_of(layers: Items[LayerDescription], hidden: int, first: int) -> list[Product]:
    """Of every layer from number `first` on, in the decoder's order, while the layers still have their weights."""
    found = []
    for index, layer in enumerate(layers, first):
        attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
        qkv = ("qkv",) if len(layer.qkv) == 1 else ("q", "k", "v")
        gates = ("gate_up",) if getattr(layer.mlp, "gate_up_proj", None) is not None else ("gate", "up")
        attention_out, mlp_out = (linear.weight.shape[1] for linear in layer.outputs)
        wide = [len(part) for part in layer.gate_up]
        found += [
            Product(_names(attention, qkv), tuple(part.weight.shape[0] for part in layer.qkv), hidden),
            Product(_names(attention, ("o",)), (hidden,), _filled(attention_out)),
            Product(_names(mlp, gates), tuple(wide) if len(gates) == 2 else (sum(wide),), hidden, gated=True),
            Product(_names(mlp, ("down",)), (hidden,), _filled(mlp_out)),
        ]
    return found


class PackedAdapter:
    """An adapter in the decoder's form, with the memory that the decoder has addresses of."""

    def __init__(self, products: Items[Product], part: AdapterPart, library: ctypes.CDLL) -> None:
        self._part, self._rank, self._library = part, -(-part.rank // COLUMNS) * COLUMNS, library
        changed = [[name for name in product.linears if name in part.pairs] for product in products]
        outputs = [self._up(product) if names else None for product, names in zip(products, changed, strict=True)]
        self._arena = Arena(sum(packed_bytes(up.shape[0], up.shape[1], up.itemsize) for up in outputs if up is not None))
        self._kept: list[Tensor] = []
        triples = zip(products, changed, outputs, strict=True)
        self.deltas = (CDelta * len(products))(*[self._delta(product, names, up) for product, names, up in triples])
        del self._part  # its memory is not needed any more

    def _delta(self, product: Product, names: list[str], up: Tensor | None) -> CDelta:
        if up is None:
            return CDelta()
        down = torch.cat([self._down(product, name) for name in names])
        places = self._places(product, names)
        self._kept += [down, places, packed := pack(up, self._arena, self._library, threads=1)]
        addresses = [tensor.data_ptr() for tensor in (down, packed, places)]
        return CDelta(*addresses, len(down), self._rank, product.inputs, self._part.scale)

    def _down(self, product: Product, name: str) -> Tensor:
        a, _ = self._part.pairs[name]
        return pad(a, (0, product.inputs - a.shape[1], 0, self._rank - len(a)))

    def _up(self, product: Product) -> Tensor:
        """`outputs x rank`, zero for what the adapter leaves as it is."""
        pairs, dtype = self._part.pairs, next(iter(self._part.pairs.values()))[0].dtype
        parts = [
            pad(pairs[name][1], (0, self._rank - self._part.rank)) if name in pairs else torch.zeros(count, self._rank, dtype=dtype)
            for name, count in zip(product.linears, product.outputs, strict=True)
        ]
        return product.joined(parts)

    def _places(self, product: Product, names: list[str]) -> Tensor:
        """Two for each panel. Linears begin at whole half panels: heads are a multiple of 32, gates alternate by 16."""
        starts = [names.index(name) * self._rank if name in names else 0 for name in product.linears]
        each = [torch.full((count, 1), start) for start, count in zip(starts, product.outputs, strict=True)]
        rows = product.joined(each).flatten()
        return pad(rows, (0, -len(rows) % PANEL))[:: PANEL // 2].to(torch.int32).contiguous()


def _names(prefix: str, linears: Items[str]) -> tuple[str, ...]:
    return tuple(f"{prefix}{linear}_proj" for linear in linears)


def _filled(inputs: int) -> int:
    return -(-inputs // (PANEL // 2)) * (PANEL // 2)


def declare(library: Any) -> None:
    library.mmaas_decoder_put_adapter.restype = None
    library.mmaas_decoder_put_adapter.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(CDelta)]
