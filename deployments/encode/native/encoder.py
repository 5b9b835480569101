"""The compiled encoder (`encoder.cpp`) over the weights of a transformers module: rows without padding, one call.

Knows where BERT-like families keep their layers. Whether it gives the module's own results is `loading.py`'s question.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deployments.encode.inspection import OFFSET
from deployments.encode.row import Floats, Row, starts_of
from deployments.engine.native.build import NativeUnavailable, library

PANEL = 32
OUT_OF_MEMORY = -2
"""Both of encoder.cpp."""
ACTIVATIONS = {
    "gelu": 0,
    "gelu_new": 1,
    "gelu_pytorch_tanh": 1,
    "gelu_fast": 1,
    "relu": 2,
    "silu": 3,
    "swish": 3,
}

_Pointer, _Int = ctypes.c_void_p, ctypes.c_int64


class _Matrix(ctypes.Structure):
    _fields_ = [("panels", _Pointer), ("bias", _Pointer), ("inputs", _Int), ("outputs", _Int)]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", _Pointer), ("bias", _Pointer)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *[(name, _Matrix) for name in ("attention_in", "attention_out", "mlp_in", "mlp_out")],
        *[(name, _Norm) for name in ("attention_norm", "mlp_norm")],
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        *[(name, _Int) for name in ("num_layers", "hidden", "heads", "head_size", "activation", "is_float32")],
        *[(name, _Pointer) for name in ("words", "positions", "types", "distances")],
        ("max_distance", _Int),
        ("norm", _Norm),
        ("eps", ctypes.c_float),
        ("threads", ctypes.c_int32),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *[(name, _Pointer) for name in ("tokens", "positions", "types", "starts")],
        ("num_rows", _Int),
        ("out", _Pointer),
    ]


class CompiledEncoder:
    """Owns packed weights and threads. Not for two callers at once."""

    def __init__(self, base: Any, *, dtype: torch.dtype, threads: int, cache: Path) -> None:
        """`base`: the module without any head. Raises NativeUnavailable for one that it can't run."""
        self._dtype, self._kept = dtype, list[Tensor]()
        self._handle = None
        config, embeddings = base.config, base.embeddings
        blocks = _blocks(base)
        norm = embeddings.LayerNorm
        self.hidden = hidden = norm.normalized_shape[0]
        heads, activation = config.num_attention_heads, _activation(config)
        if hidden % PANEL or hidden % heads or hidden // heads % PANEL or blocks[0].mlp_in.out_features % PANEL:
            raise NativeUnavailable(f"widths of {hidden} over {heads} heads are no multiples of {PANEL}")
        if {block.eps for block in blocks} != {norm.eps}:
            raise NativeUnavailable("its norms differ in epsilon")
        self._padding = embeddings.padding_idx if config.model_type in OFFSET else None
        self._num_types = embeddings.token_type_embeddings.num_embeddings if hasattr(embeddings, "token_type_embeddings") else 0
        self._library = _declared(library(cache, Path(__file__).parent))
        self._layers = (_Layer * len(blocks))(*[self._layer(block) for block in blocks])
        tables = [embeddings.word_embeddings, embeddings.position_embeddings, getattr(embeddings, "token_type_embeddings", None)]
        distances, reach = _distances(base)
        model = _Model(
            self._layers,
            *[len(blocks), hidden, heads, hidden // heads, activation, dtype is torch.float32],
            *[self._address(table.weight, dtype) if table is not None else None for table in tables],
            self._address(distances, torch.float32) if distances is not None else None,
            reach,
            self._norm(norm),
            norm.eps,
            threads,
        )
        self._handle = self._library.mmaas_encoder_new(ctypes.byref(model))
        if not self._handle:
            raise MemoryError("no memory for the compiled encoder")

    def states(self, rows: Sequence[Row]) -> Floats:
        """`T x H` hidden states of the last layer, the rows' tokens one behind the other. Raises MemoryError."""
        starts = starts_of(rows)
        tokens = np.concatenate([row.ids for row in rows])
        positions = self._positions(rows, tokens, starts)
        types = np.zeros_like(tokens)
        if self._num_types > 1:
            for row, start in zip(rows, starts, strict=False):
                if row.types is not None:
                    types[start : start + len(row)] = row.types
        out = np.empty((len(tokens), self.hidden), np.float32)
        batch = _Batch(*[array.ctypes.data for array in (tokens, positions, types, starts)], len(rows), out.ctypes.data)
        if self._library.mmaas_encoder_run(self._handle, ctypes.byref(batch)) == OUT_OF_MEMORY:
            raise MemoryError("no memory for a step of so many tokens")
        return out

    def close(self) -> None:
        """End the threads. Must not be used any more."""
        if self._handle:
            self._library.mmaas_encoder_delete(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()

    def _positions(self, rows: Sequence[Row], tokens: Any, starts: Any) -> Any:
        lengths = np.diff(starts)
        positions = np.arange(len(tokens), dtype=np.int32) - np.repeat(starts[:-1], lengths).astype(np.int32)
        if self._padding is None:
            return positions
        is_word = tokens != self._padding  # transformers gives padding, wherever it stands, the position of its own id
        if is_word.all():
            return positions + np.int32(self._padding + 1)
        counted = [np.cumsum(row.ids != self._padding, dtype=np.int32) for row in rows]
        return (np.concatenate(counted) * is_word + self._padding).astype(np.int32)

    def _layer(self, block: _Block) -> _Layer:
        return _Layer(
            self._matrix(*block.attention_in),
            *[self._matrix(linear) for linear in (block.attention_out, block.mlp_in, block.mlp_out)],
            *[self._norm(norm) for norm in (block.attention_norm, block.mlp_norm)],
        )

    def _matrix(self, *linears: nn.Linear) -> _Matrix:
        weight = torch.cat([linear.weight.detach() for linear in linears]).to(self._dtype)
        outputs, inputs = weight.shape
        per_lane = 4 // weight.element_size()
        panels = weight.view(outputs // PANEL, PANEL, inputs // per_lane, per_lane).transpose(1, 2).contiguous()
        bias = torch.cat([linear.bias.detach() for linear in linears])
        return _Matrix(self._address(panels, self._dtype), self._address(bias, torch.float32), inputs, outputs)

    def _norm(self, norm: nn.LayerNorm) -> _Norm:
        return _Norm(self._address(norm.weight, torch.float32), self._address(norm.bias, torch.float32))

    def _address(self, tensor: Tensor, dtype: torch.dtype) -> int:
        tensor = tensor.detach().to(dtype).contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


class _Block:
    """One layer's parts, by what they do."""

    def __init__(self, linears: Sequence[nn.Linear], norms: Sequence[nn.LayerNorm]) -> None:
        if any(linear.bias is None for linear in linears):
            raise NativeUnavailable("a linear layer has no bias")
        self.attention_in, (self.attention_out, self.mlp_in, self.mlp_out) = linears[:3], linears[3:]
        self.attention_norm, self.mlp_norm = norms
        self.eps = self.attention_norm.eps if self.attention_norm.eps == self.mlp_norm.eps else None


def _bert(layer: Any) -> _Block:
    own, attention = layer.attention.self, layer.attention.output
    linears = [own.query, own.key, own.value, attention.dense, layer.intermediate.dense, layer.output.dense]
    return _Block(linears, [attention.LayerNorm, layer.output.LayerNorm])


def _distilbert(layer: Any) -> _Block:
    own = layer.attention
    linears = [own.q_lin, own.k_lin, own.v_lin, own.out_lin, layer.ffn.lin1, layer.ffn.lin2]
    return _Block(linears, [layer.sa_layer_norm, layer.output_layer_norm])


def _mpnet(layer: Any) -> _Block:
    own = layer.attention.attn
    linears = [own.q, own.k, own.v, own.o, layer.intermediate.dense, layer.output.dense]
    return _Block(linears, [layer.attention.LayerNorm, layer.output.LayerNorm])


_LAYERS: dict[str, tuple[str, Callable[[Any], _Block]]] = {
    "bert": ("encoder", _bert),
    "roberta": ("encoder", _bert),
    "xlm-roberta": ("encoder", _bert),
    "distilbert": ("transformer", _distilbert),
    "mpnet": ("encoder", _mpnet),
}


def _blocks(base: Any) -> list[_Block]:
    family = base.config.model_type
    if family not in _LAYERS:
        raise NativeUnavailable(f"models of type {family!r} have other layers")
    if getattr(base.config, "position_embedding_type", "absolute") != "absolute":
        raise NativeUnavailable("its positions are not absolute")
    holder, take = _LAYERS[family]
    return [take(layer) for layer in getattr(base, holder).layer]


def _activation(config: Any) -> int:
    name = getattr(config, "hidden_act", None) or config.activation
    if name not in ACTIVATIONS:
        raise NativeUnavailable(f"the activation {name!r:.40} is not known")
    return ACTIVATIONS[name]


def _distances(base: Any) -> tuple[Tensor | None, int]:
    """What MPNet adds to a score, by head and distance from `1 - reach` to `reach - 1`."""
    if base.config.model_type != "mpnet":
        return None, 0
    reach = base.config.max_position_embeddings
    buckets = base.encoder.relative_position_bucket(torch.arange(1 - reach, reach))
    return base.encoder.relative_attention_bias.weight.detach()[buckets].T, reach


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    loaded.mmaas_encoder_new.restype = _Pointer
    loaded.mmaas_encoder_new.argtypes = [_Pointer]
    loaded.mmaas_encoder_delete.restype = None
    loaded.mmaas_encoder_delete.argtypes = [_Pointer]
    loaded.mmaas_encoder_run.restype = ctypes.c_int
    loaded.mmaas_encoder_run.argtypes = [_Pointer, _Pointer]
    return loaded
