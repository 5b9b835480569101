"""Tensors in safetensors files, read in parts: a file is mapped, and only the pages of the wanted part are touched.

Pages that were read are given back at once, so a rank's memory holds its own part and no copy of the file.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deployments.engine.cuts import Cut
from deployments.engine.progress import Progress
from deployments.engine.safetensors_header import TensorEntry

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BOOL": torch.bool,
}


class MappedFile:
    """One file whose header has been checked. The mapping is private: nothing that is done to a tensor reaches the file."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._data = 8 + int(struct.unpack("<Q", file.read(8))[0])
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, entry: TensorEntry) -> Tensor:
        """A view of the mapped bytes."""
        dtype = TYPES[entry.dtype]
        if not entry.num_elements:
            return torch.empty(entry.shape, dtype=dtype)
        start = self._data + entry.start
        if start % dtype.itemsize:  # allowed by the format, made by no known writer
            return torch.frombuffer(bytearray(self._map[start : self._data + entry.end]), dtype=dtype).view(entry.shape)
        return torch.frombuffer(self._map, dtype=dtype, count=entry.num_elements, offset=start).view(entry.shape)

    def release(self, entry: TensorEntry) -> None:
        """Drop a tensor's pages from this process; the machine's own cache keeps them while it has room."""
        start = (self._data + entry.start) // mmap.PAGESIZE * mmap.PAGESIZE
        if entry.end > entry.start:
            self._map.madvise(mmap.MADV_DONTNEED, start, self._data + entry.end - start)


class Part:
    """This rank's part of a stored tensor, read when somebody takes it with `[...]`, as transformers' loader does."""

    def __init__(
        self, file: MappedFile, entry: TensorEntry, cut: Cut, dtype: torch.dtype | None, progress: Progress, *, pinned: bool = False
    ) -> None:
        self.file, self.entry, self.cut, self.progress, self.pinned = file, entry, cut, progress, pinned
        self.dtype = dtype or TYPES[entry.dtype]

    @property
    def num_bytes(self) -> int:
        """Of the part, as it is stored."""
        return self.cut.num_elements * TYPES[self.entry.dtype].itemsize

    def __getitem__(self, everything: Any) -> Tensor:
        part = self.cut.take(self.file.tensor(self.entry), self.dtype, pinned=self.pinned)
        self.file.release(self.entry)
        self.progress.add(self.num_bytes)
        return part


class MappedFiles:
    """Files opened when first needed. `pinned`: parts are read to where a GPU fetches them by itself."""

    def __init__(self, entries: Mapping[str, TensorEntry], paths: Mapping[str, Path], *, pinned: bool = False) -> None:
        self.entries, self._paths, self._pinned = entries, paths, pinned
        self._open: dict[Path, MappedFile] = {}

    def part(self, name: str, cut: Cut | None, dtype: torch.dtype | None, progress: Progress) -> Part:
        """`cut` None: all of it; `dtype` None: as stored."""
        entry, path = self.entries[name], self._paths[name]
        if path not in self._open:
            self._open[path] = MappedFile(path)
        return Part(self._open[path], entry, cut or Cut.none(entry.shape), dtype, progress, pinned=self._pinned)
