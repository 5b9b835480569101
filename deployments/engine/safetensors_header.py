"""The header of a safetensors file, checked before anybody maps the file. Knows the format, not models; reads no tensor data.

Format: 8 bytes little-endian length, a JSON object of that length, then the tensors' bytes one behind the other
(https://github.com/huggingface/safetensors, section "Format").
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ModelNotServable

MAX_HEADER_BYTES = 100_000_000
BITS = {
    **dict.fromkeys(["F4"], 4),
    **dict.fromkeys(["F6_E2M3", "F6_E3M2"], 6),
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"], 8),
    **dict.fromkeys(["U16", "I16", "F16", "BF16"], 16),
    **dict.fromkeys(["U32", "I32", "F32"], 32),
    **dict.fromkeys(["U64", "I64", "F64", "C64"], 64),
}
"""Bits of one element, by the name of its type in the file."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: type as the file names it, and where its bytes lie behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Tensors by name. Raises ModelNotServable for a file that isn't whole and consistent."""
    try:
        return _read(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelNotServable(f"{path.name} is truncated or damaged: {error}") from None


def _read(path: Path) -> dict[str, TensorEntry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        content = file.read(length)
    header = json.loads(content.decode("utf-8"), object_pairs_hook=_without_repetition)
    if not content.startswith(b"{") or not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    _check_metadata(header.pop("__metadata__", None))
    tensors = {name: _entry(name, value) for name, value in header.items()}
    _check_layout(tensors, size - 8 - length)
    return tensors


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("the header names a tensor twice")
    return unique


def _check_metadata(metadata: Any) -> None:
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise ValueError("the header's metadata are not texts")


def _entry(name: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r:.80} lacks its type, shape or place")
    dtype, shape, place = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"tensor {name!r:.80} has the unknown type {dtype!r:.40}")
    if not (_are_counts(shape) and _are_counts(place) and len(place) == 2):
        raise ValueError(f"tensor {name!r:.80} has no proper shape or place")
    entry = TensorEntry(dtype, tuple(shape), place[0], place[1])
    if entry.num_elements * BITS[dtype] != (entry.end - entry.start) * 8:
        raise ValueError(f"tensor {name!r:.80} of shape {shape!r:.80} and type {dtype} has {entry.end - entry.start} bytes")
    return entry


def _are_counts(values: Any) -> bool:
    """A list of at most 64 integers from 0 to 2^63."""
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 63 for v in values)
    )


def _check_layout(tensors: dict[str, TensorEntry], num_bytes: int) -> None:
    """Every byte behind the header belongs to one tensor: no hole, no overlap, nothing missing at the end, nothing behind it."""
    reached = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != reached:
            raise ValueError(f"tensor {name!r:.80} begins at byte {entry.start}, not at {reached}")
        reached = entry.end
    if reached != num_bytes:
        raise ValueError(f"its tensors need {reached} bytes, there are {num_bytes}")
