"""Tokens of a whole step, chosen by compiled code on a few threads of its own. `sampler.Readable` says what it does."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from collections.abc import Sequence as Items
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deployments.engine.native.build import library
from deployments.engine.sampler import ALL, Sampled, Wanted, bans_stop, uniform
from deployments.engine.sequence import Sequence
from deployments.engine.structured import Allowed

_WAY = [("uniform", "f8"), ("temperature", "f4"), ("top_p", "f4"), ("min_p", "f4"), ("top_k", "i4")]
_RULE = np.dtype([*_WAY, ("allowed", "u8"), ("relents", "i4")], align=True)
"""`Rule` of sampling.cpp."""
_GREEDY = (0.0, 0.0, 1.0, 0.0, 0, 0, 0)
_STEERING = np.dtype(
    [
        ("repetition", "f4"),
        ("frequency", "f4"),
        ("presence", "f4"),
        ("num_prompt", "i4"),
        *((name, "i4") for name in ("num_tokens", "num_biased", "num_banned")),
        *((name, "u8") for name in ("tokens", "biased", "bias", "banned")),
    ],
    align=True,
)
"""`Steering` of sampling.cpp."""


class NativeSampler:
    """A `Sampler` of `sampler.py`. Owns its threads, which sleep between steps. Raises NativeUnavailable."""

    def __init__(self, cache: Path, threads: int) -> None:
        self._library = _declared(library(cache))
        self._handle = self._library.mmaas_sampler_new(threads)

    def adjust(self, logits: Tensor, sequences: Items[Sequence], rows: Items[int]) -> list[int]:
        _require_numbers(logits)
        return [row for row in rows if not self._adjust(logits[row], sequences[row])]

    def _adjust(self, row: Tensor, sequence: Sequence) -> bool:
        """Says whether it was finite."""
        kept, steering = _steering(sequence)
        sound: int = self._library.mmaas_sampler_adjust(self._handle, row.data_ptr(), len(row), steering.ctypes.data)
        del kept  # what `steering` points to lived until here
        return bool(sound)

    def choose(self, logits: Tensor, sequences: Items[Sequence], allowed: Mapping[int, Allowed] = ALL) -> list[int]:
        _require_numbers(logits)
        rules = np.array([_rule(sequence) for sequence in sequences], _RULE)
        for row, bits in allowed.items():
            rules["allowed"][row] = _address(bits, logits.shape[1])
            rules["relents"][row] = bans_stop(sequences[row])
        tokens = np.empty(len(rules), np.int64)
        self._library.mmaas_sampler_choose(
            self._handle, logits.data_ptr(), len(rules), logits.shape[1], rules.ctypes.data, tokens.ctypes.data
        )
        return tokens.tolist()

    def report(self, logits: Tensor, wanted: Items[Wanted]) -> list[Sampled]:
        _require_numbers(logits)
        asked = np.array(wanted, np.int64)
        most = min(int(asked[:, 2].max()), logits.shape[1])
        own, best = np.empty(len(asked), np.float32), np.empty((len(asked), most), np.float32)
        columns = np.empty((len(asked), most), np.int64)
        places = [array.ctypes.data for array in (asked, own, columns, best)]
        self._library.mmaas_sampler_report(self._handle, logits.data_ptr(), logits.shape[1], len(asked), most, *places)
        lines = zip(wanted, own.tolist(), columns.tolist(), best.tolist(), strict=True)
        return [
            Sampled(each.token, logprob, tuple(zip(tokens[: each.best], values[: each.best], strict=True)))
            for each, logprob, tokens, values in lines
        ]

    def __del__(self) -> None:
        if handle := getattr(self, "_handle", None):
            self._library.mmaas_sampler_delete(handle)


def _address(bits: Allowed, width: int) -> int:
    if bits.dtype != np.uint32 or not bits.flags.c_contiguous or 32 * len(bits) < width:
        raise ValueError(f"{bits.dtype} x {len(bits)} is no mask of {width} tokens")
    return bits.ctypes.data


def _rule(sequence: Sequence) -> tuple[float, float, float, float, int, int, int]:
    sampling = sequence.sampling
    if not sampling.temperature:
        return _GREEDY
    noise = uniform(sequence.seed, sequence.num_output)
    return noise, sampling.temperature, sampling.top_p, sampling.min_p, min(sampling.top_k, (1 << 31) - 1), 0, 0


def _steering(sequence: Sequence) -> tuple[list[np.ndarray], np.ndarray]:
    """As the compiled code takes it, and the arrays that it points to."""
    sampling = sequence.sampling
    penalised = sampling.repetition_penalty != 1.0 or sampling.frequency_penalty or sampling.presence_penalty
    biased, bias = zip(*sampling.logit_bias, strict=True) if sampling.logit_bias else ((), ())
    kept = [
        np.array(sequence.tokens if penalised else (), np.int32),
        np.array(biased, np.int32),
        np.array(bias, np.float32),
        np.array(list(sequence.stop_ids) if bans_stop(sequence) else (), np.int32),
    ]
    sizes = len(kept[0]), len(kept[1]), len(kept[3])
    strengths = sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty
    return kept, np.array((*strengths, sequence.num_prompt, *sizes, *(array.ctypes.data for array in kept)), _STEERING)


def _require_numbers(logits: Tensor) -> None:
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"logits are contiguous float32, not {logits.dtype}")


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    pointer = ctypes.c_void_p
    loaded.mmaas_sampler_new.restype = pointer
    loaded.mmaas_sampler_new.argtypes = [ctypes.c_int32]
    loaded.mmaas_sampler_choose.restype = None
    loaded.mmaas_sampler_choose.argtypes = [pointer, pointer, ctypes.c_int64, ctypes.c_int64, pointer, pointer]
    loaded.mmaas_sampler_adjust.restype = ctypes.c_int32
    loaded.mmaas_sampler_adjust.argtypes = [pointer, pointer, ctypes.c_int64, pointer]
    loaded.mmaas_sampler_report.restype = None
    loaded.mmaas_sampler_report.argtypes = [pointer, pointer, *[ctypes.c_int64] * 3, *[pointer] * 4]
    loaded.mmaas_sampler_delete.restype = None
    loaded.mmaas_sampler_delete.argtypes = [pointer]
    return loaded
