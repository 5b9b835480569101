"""How fast this machine reads memory, measured, and what that allows a model: the bound that no engine can pass.

A decode step reads every weight once, whatever the number of sequences, and the keys and values of every token of each of them:

    bytes of a step = 2 * parameters read + concurrency * mean length * bytes of a token's keys and values
    tokens per second <= concurrency * bandwidth / bytes of a step

in bfloat16, where the mean length is prompt + half of the answer, and parameters read are all but an embedding that isn't tied
to the output layer (of that a step reads some rows). The bandwidth is that of a buffer of the weights' size that is read over and
over, so that what stays in the caches from step to step counts. Computing the prompts takes time too and isn't in the bound:
nobody reaches it.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

BEYOND_CACHES_BYTES = 1 << 29
"""A buffer of which no cache of a core or two keeps much; larger ones are read no slower."""
SOURCE = Path(__file__).with_name("bandwidth.cpp")
BYTES = 2  # of a number in bfloat16


def measure(num_bytes: int, threads: int, *, rounds: int | None = None, tries: int = 5) -> float:
    """Bytes per second that `threads` threads read together from a buffer of that size (beyond the caches: of half a GiB), the best
    of some tries: whoever disturbs only takes away."""
    reader = Reader(num_bytes, threads)
    rounds = rounds or max(1, BEYOND_CACHES_BYTES // num_bytes)
    return max(reader.read(rounds) for _ in range(tries))


class Reader:
    """A buffer that is read again and again by as many threads."""

    def __init__(self, num_bytes: int, threads: int) -> None:
        self._words = np.ones(min(num_bytes, BEYOND_CACHES_BYTES) // 8, dtype=np.uint64)  # written, so that every page is there
        self._threads = threads
        self._sink = ctypes.c_uint64()

    def read(self, rounds: int = 1) -> float:
        """Bytes per second now."""
        words, sink = self._words, ctypes.byref(self._sink)
        speed: float = _library().read_bandwidth(words.ctypes.data, len(words), self._threads, rounds, sink)
        return speed


@cache
def _library() -> ctypes.CDLL:
    """Built by the machine's compiler, which the engine needs as well; takes a second."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "bandwidth.so"
        command = ["c++", "-std=c++17", "-O3", "-march=native", "-pthread", "-fPIC", "-shared", str(SOURCE), "-o", str(target)]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(target))
    library.read_bandwidth.restype = ctypes.c_double
    library.read_bandwidth.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    return library


def weight_bytes(spec: Mapping[str, Any]) -> int:
    """Of the weights that a decode step of a Llama or Qwen2 reads. `spec` is one of `bench.models.MODELS`."""
    hidden, layers, heads = spec["hidden_size"], spec["num_hidden_layers"], spec["num_attention_heads"]
    kv = hidden // heads * spec["num_key_value_heads"]
    bias = hidden + 2 * kv if spec["model_type"] == "qwen2" else 0
    layer = 2 * hidden * hidden + 2 * hidden * kv + bias + 3 * hidden * spec["intermediate_size"] + 2 * hidden
    return BYTES * (layers * layer + spec["vocab_size"] * hidden + hidden)


def kv_bytes(spec: Mapping[str, Any]) -> int:
    """Of one token's keys and values in all layers."""
    width = spec["hidden_size"] // spec["num_attention_heads"] * spec["num_key_value_heads"]
    return int(BYTES * 2 * width * spec["num_hidden_layers"])


def step_bytes(spec: Mapping[str, Any], concurrency: int, mean_tokens: float) -> int:
    """What a decode step of `concurrency` sequences reads, their mean length being `mean_tokens`."""
    return round(weight_bytes(spec) + concurrency * mean_tokens * kv_bytes(spec))


def bound(spec: Mapping[str, Any], concurrency: int, mean_tokens: float, bytes_per_s: float) -> float:
    """Output tokens per second that reading alone allows."""
    return concurrency * bytes_per_s / step_bytes(spec, concurrency, mean_tokens)
