"""Tokens of a whole step, chosen by compiled code on a few threads of its own. `sampler.choose` says what it does."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from collections.abc import Sequence as Items
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deployments.engine.native.build import library
from deployments.engine.sampler import ALL, bans_stop, uniform
from deployments.engine.sequence import Sequence
from deployments.engine.structured import Allowed

_WAY = [("uniform", "f8"), ("temperature", "f4"), ("top_p", "f4"), ("min_p", "f4"), ("top_k", "i4")]
_RULE = np.dtype([*_WAY, ("allowed", "u8"), ("relents", "i4")], align=True)
"""`Rule` of sampling.cpp."""
_GREEDY = (0.0, 0.0, 1.0, 0.0, 0, 0, 0)


class NativeSampler:
    """A `Choose` of `sampler.py`. Owns its threads, which sleep between steps. Raises NativeUnavailable."""

    def __init__(self, cache: Path, threads: int) -> None:
        self._library = _declared(library(cache))
        self._handle = self._library.mmaas_sampler_new(threads)

    def __call__(self, logits: Tensor, sequences: Items[Sequence], allowed: Mapping[int, Allowed] = ALL) -> list[int]:
        logits = logits.to(torch.float32).contiguous()
        rules = np.array([_rule(sequence) for sequence in sequences], _RULE)
        for row, bits in allowed.items():
            rules["allowed"][row] = _address(bits, logits.shape[1])
            rules["relents"][row] = bans_stop(sequences[row])
        tokens = np.empty(len(rules), np.int64)
        self._library.mmaas_sampler_choose(
            self._handle, logits.data_ptr(), len(rules), logits.shape[1], rules.ctypes.data, tokens.ctypes.data
        )
        return tokens.tolist()

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


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    pointer = ctypes.c_void_p
    loaded.mmaas_sampler_new.restype = pointer
    loaded.mmaas_sampler_new.argtypes = [ctypes.c_int32]
    loaded.mmaas_sampler_choose.restype = None
    loaded.mmaas_sampler_choose.argtypes = [pointer, pointer, ctypes.c_int64, ctypes.c_int64, pointer, pointer]
    loaded.mmaas_sampler_delete.restype = None
    loaded.mmaas_sampler_delete.argtypes = [pointer]
    return loaded
