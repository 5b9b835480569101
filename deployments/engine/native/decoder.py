"""A rank's model through the compiled decoder: same door as `Runner`, same logits, several times faster.

`prove` is the way in: it packs the weights of a transformers module, layer by layer, giving the module's own memory back, and
compares its logits with those that the module gave before.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deployments.engine.adapters import AdapterPart
from deployments.engine.batch import Batch
from deployments.engine.handover import Handover
from deployments.engine.native import low_rank, packing
from deployments.engine.native.build import library
from deployments.engine.native.description import Description, LayerDescription
from deployments.engine.native.low_rank import PackedAdapter, products_of
from deployments.engine.native.meeting import Meeting
from deployments.engine.native.packing import PANEL, Arena, CMatrix, interleave, joined, pack, packed_bytes, padded, unsigned

PHASES = ("embed", "norm", "linear", "rotary", "attention", "reduce", "logits")
"""Of decoder.cpp, in its order."""

AllReduce = Callable[[Tensor], None]
"""Sums a float32 tensor over all ranks, in place."""

OUT_OF_MEMORY = -2
"""Of decoder.cpp."""

_Reduce = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_float), ctypes.c_int64)
_Pointer, _Int, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Layer(ctypes.Structure):
    _fields_ = [
        *[(name, CMatrix) for name in ("attention_in", "attention_out", "mlp_in", "mlp_out")],
        *[(name, _Pointer) for name in ("input_norm", "query_norm", "key_norm", "attention_norm", "mlp_input_norm", "mlp_norm")],
        *[(name, _Pointer) for name in ("keys", "values")],
        ("scale", _Float),
        ("softcap", _Float),
        ("window", _Int),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        *[(name, _Int) for name in ("num_layers", "hidden", "heads", "kv_heads", "head_size", "rotary_size", "max_positions")],
        *[(name, _Int) for name in ("vocabulary", "block_size", "activation", "is_float32")],
        *[(name, _Pointer) for name in ("embeddings", "cosines", "sines", "final_norm")],
        ("head", CMatrix),
        ("head_offset", _Int),
        *[(name, _Float) for name in ("eps", "embedding_scale", "residual_scale", "logit_scale", "logit_softcap")],
        ("threads", ctypes.c_int32),
        ("meeting", _Pointer),
        ("timeout_s", ctypes.c_double),
        ("reduce", _Reduce),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *[(name, _Pointer) for name in ("tokens", "starts", "counts", "tables", "rows")],
        *[(name, _Int) for name in ("num_tokens", "num_sequences", "num_rows", "width")],
        *[(name, _Pointer) for name in ("logits", "stream_in", "stream_out", "adapters")],
    ]


class Decoder:
    """Owns packed weights, pages and the threads that work on them. `wire` is None for a rank that is alone in its stage,
    `handover` for one whose stage is alone."""

    def __init__(
        self,
        model: Description,
        *,
        num_blocks: int,
        block_size: int,
        threads: int,
        cache: Path,
        rank: int = 0,
        wire: Meeting | AllReduce | None = None,
        handover: Handover | None = None,
    ) -> None:
        self._library = _declared(library(cache))
        self._model, self._rank, self._threads, self._handover = model, rank, threads, handover
        self._meeting = wire if isinstance(wire, Meeting) else None
        self._all_reduce = None if isinstance(wire, Meeting) else wire
        self._failure: BaseException | None = None
        self._closing = threading.Lock()
        self._kept: list[Any] = []  # what the decoder has addresses of
        self._products = products_of(model.layers, model.hidden, model.first_layer)
        self._adapters: dict[int, PackedAdapter] = {}  # by slot
        self._arena = Arena(_total_bytes(model))
        pages = num_blocks * block_size * model.kv_heads * model.head_size
        # A page that was never written costs nothing: numpy's zeros are the kernel's.
        self._pages = [np.zeros((2, pages), np.dtype(f"i{model.dtype.itemsize}")) for _ in model.layers]
        self._layers = (_Layer * len(model.layers))(*[self._layer(*pair) for pair in zip(model.layers, self._pages, strict=True)])
        self._reduce = _Reduce(self._on_reduce) if self._all_reduce else _Reduce()
        described = self._described(block_size, threads)
        if model.head is not None and model.head.weight is not model.embeddings:
            _free(model.head)
        self._handle = self._library.mmaas_decoder_new(ctypes.byref(described))

    def run(self, batch: Batch) -> Tensor:
        """`R x V` float32 logits, one row for each of `batch.rows`; in a stage before the last, `R x H` of its hidden states."""
        tokens, starts, counts, tables = (
            np.ascontiguousarray(a, np.int32) for a in (batch.tokens, batch.starts, batch.counts, batch.tables)
        )
        rows = np.ascontiguousarray(batch.rows, np.int64)
        arrays = [array.ctypes.data for array in (tokens, starts, counts, tables, rows)]
        adapters = np.ascontiguousarray(batch.adapters, np.int32)
        step = _Step(*arrays, len(tokens), len(starts), len(rows), tables.shape[1])
        step.adapters = adapters.ctypes.data if len(adapters) else None
        width, is_first, is_last = self._model.hidden, self._model.embeddings is not None, self._model.head is not None
        if not is_first:
            assert self._handover, "a stage needs somebody to get hidden states from"
            entered = self._handover.take(len(tokens), width, torch.float32)
            step.stream_in = entered.data_ptr()
        out = torch.empty(len(rows), self._model.vocabulary) if is_last else torch.empty(len(tokens), width)
        setattr(step, "logits" if is_last else "stream_out", out.data_ptr())
        self._check(self._library.mmaas_decoder_run(self._handle, ctypes.byref(step)))
        if is_last:
            return out
        assert self._handover, "a stage needs somebody to give hidden states to"
        self._handover.give(out)
        return out.index_select(0, torch.from_numpy(rows))

    def pack_adapter(self, part: AdapterPart) -> PackedAdapter:
        return PackedAdapter(self._products, part, self._library)

    def put_adapter(self, slot: int, packed: PackedAdapter | None) -> None:
        self._library.mmaas_decoder_put_adapter(self._handle, slot, packed.deltas if packed else None)
        if packed:
            self._adapters[slot] = packed
        else:
            self._adapters.pop(slot, None)

    def profile(self) -> dict[str, float]:
        """Seconds in each kind of work so far."""
        seconds = (ctypes.c_double * len(PHASES))()
        self._library.mmaas_decoder_profile(self._handle, seconds)
        return dict(zip(PHASES, seconds, strict=True))

    @property
    def ticks(self) -> float:
        """Grows within a step, as its parts come to an end. May be asked from another thread, at any time."""
        with self._closing:
            return sum(self.profile().values()) if self._handle else 0.0

    def close(self) -> None:
        """End the threads. The decoder must not be used any more."""
        with self._closing:
            if self._handle:
                self._library.mmaas_decoder_delete(self._handle)
                self._handle = None

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    @property
    def weight_bytes(self) -> int:
        embeddings = self._model.embeddings
        return self._arena.num_bytes + (0 if embeddings is None else embeddings.nbytes)

    def _check(self, result: int) -> None:
        if result == OUT_OF_MEMORY:
            raise MemoryError("no memory for a step of so many tokens; lower engine.max_batch_tokens")
        if result and self._meeting:
            self._meeting.check(result)
        elif result:
            assert self._failure, f"the decoder failed with {result} and nobody said why"
            raise self._failure

    def _layer(self, layer: LayerDescription, pages: np.ndarray[Any, Any]) -> _Layer:
        qkv = layer.qkv
        attention_out, mlp_out = layer.outputs
        described = _Layer(
            self._matrix(torch.cat([part.weight for part in qkv]), _bias_of(qkv), _scales_of(qkv)),
            self._summed(attention_out),
            self._matrix(interleave(*layer.gate_up), _interleaved(layer.gate_up_bias), _interleaved(layer.gate_up_scales)),
            self._summed(mlp_out),
            *[self._address(norm) for norm in (layer.input_norm, layer.query_norm, layer.key_norm)],
            *[self._address(norm) for norm in (layer.attention_norm, layer.mlp_input_norm, layer.mlp_norm)],
            pages[0].ctypes.data,
            pages[1].ctypes.data,
            layer.call.scale,
            layer.call.softcap or 0.0,
            layer.call.window or 0,
        )
        for module in (layer.attention, layer.mlp):
            _free(module)
        return described

    def _summed(self, module: Any) -> CMatrix:
        """A linear whose results are summed over ranks: one of them adds the bias."""
        bias = None if self._rank else getattr(module, "bias", None)
        return self._matrix(_padded_inputs(module.weight), bias, getattr(module, "scales", None))

    def _matrix(self, weight: Tensor, bias: Tensor | None, scales: Tensor | None) -> CMatrix:
        """`scales` of weights in eight bits."""
        with torch.no_grad():
            numbers = weight.detach().to(self._model.dtype) if scales is None else unsigned(weight.detach())
            panels = pack(numbers, self._arena, self._library, self._threads)
        self._kept.append(panels)
        outputs, inputs = weight.shape
        addresses = [self._address(padded(numbers, outputs)) for numbers in (bias, scales)]
        return CMatrix(panels.data_ptr(), *addresses, len(panels), inputs, outputs)

    def _address(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.detach()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _described(self, block_size: int, threads: int) -> _Model:
        m = self._model
        return _Model(
            self._layers,
            *[len(m.layers), m.hidden, m.heads, m.kv_heads, m.head_size, m.rotary_size, m.max_positions],
            *[m.vocabulary, block_size, m.activation, m.dtype is torch.float32],
            *[self._address(None if x is None else x.contiguous()) for x in (m.embeddings, m.cosines, m.sines, m.final_norm)],
            CMatrix() if m.head is None else self._summed(m.head),
            m.head_offset,
            *[m.eps, m.embedding_scale, m.residual_scale, m.logit_scale, m.logit_softcap],
            threads,
            self._meeting.handle if self._meeting else None,
            self._meeting.timeout_s if self._meeting else 0.0,
            self._reduce,
        )

    def _on_reduce(self, numbers: Any, count: int) -> int:
        """Called from inside a step, on the thread that called `run`. Raises nothing: an exception can't cross C++."""
        assert self._all_reduce
        try:
            self._all_reduce(torch.from_numpy(np.ctypeslib.as_array(numbers, (count,))))
        except BaseException as error:
            self._failure = error  # `run` raises it
            return -1
        return 0


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    packing.declare(loaded)
    low_rank.declare(loaded)
    loaded.mmaas_decoder_new.restype = _Pointer
    loaded.mmaas_decoder_new.argtypes = [ctypes.POINTER(_Model)]
    loaded.mmaas_decoder_run.argtypes = [_Pointer, ctypes.POINTER(_Step)]
    loaded.mmaas_decoder_profile.argtypes = [_Pointer, ctypes.POINTER(ctypes.c_double)]
    loaded.mmaas_decoder_delete.argtypes = [_Pointer]
    return loaded


def _bias_of(parts: list[Any]) -> Tensor | None:
    return joined([getattr(part, "bias", None) for part in parts], [part.weight.shape[0] for part in parts])


def _scales_of(parts: list[Any]) -> Tensor | None:
    return torch.cat([part.scales for part in parts]) if hasattr(parts[0], "scales") else None


def _interleaved(parts: list[Tensor] | None) -> Tensor | None:
    return interleave(*parts) if parts else None


def _padded_inputs(weight: Tensor) -> Tensor:
    """The MLP's inner width is rounded up to half a panel, as `interleave` does with its outputs."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % (PANEL // 2)))


def _total_bytes(m: Description) -> int:
    def of(weight: Tensor, itemsize: int) -> int:
        return packed_bytes(weight.shape[0], weight.shape[1], itemsize)

    total = 0 if m.head is None else of(m.head.weight, m.dtype.itemsize)
    for layer in m.layers:
        attention_out, _ = layer.outputs
        itemsize = 1 if hasattr(attention_out, "scales") else m.dtype.itemsize
        inner = -(-layer.gate_up[0].shape[0] // (PANEL // 2)) * (PANEL // 2)
        total += packed_bytes(sum(part.weight.shape[0] for part in layer.qkv), m.hidden, itemsize)
        total += (
            of(attention_out.weight, itemsize)
            + packed_bytes(2 * inner, m.hidden, itemsize)
            + packed_bytes(m.hidden, inner, itemsize)
        )
    return total


def _free(module: nn.Module) -> None:
    """Give back the memory of weights that are packed now."""
    for parameter in module.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)
