"""A rank's cut and converted weights, kept on the node's disk, so that the next start reads them in one run.

    FOLDER/KEY/RANK-of-SIZE.safetensors   KEY names the model's content, the number of ranks and the type

Each file says in its header what it holds and the CRC-32 of every tensor; one that is damaged, torn or of something else is
ignored with a log. Least recently used models go first when the folder outgrows its limit. Nothing here ever fails a load.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.errors import ModelNotServable, SettingsError
from cluster.private_files import private_directory
from deployments.engine.mapped import TYPES, MappedFiles
from deployments.engine.progress import Progress
from deployments.engine.safetensors_header import read_header
from deployments.engine.stages import Place

log = logging.getLogger(__name__)

FORMAT = 1
WORTH_BYTES = 32 << 20
"""Smaller parts load as quickly from the model's own files."""
_READERS = 4
_ALIGNMENT = 64
_NAMES = {dtype: name for name, dtype in TYPES.items()}


class Copies:
    """The folder of one node. Ranks, and several models, use it at once."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def of(self, model: str, *, place: Place, dtype: str, cuts: Iterable[Any]) -> Copy:
        """`model`: digest of the model's content; `cuts`: how this rank's part is cut, plain data."""
        rank, size = place.rank, place.tp * place.pp
        shared = {"format": FORMAT, "model": model, "ranks": size, "stages": place.pp, "dtype": dtype}
        key = hashlib.sha256(json.dumps(shared).encode()).hexdigest()[:32]
        facts = shared | {"rank": rank, "cuts": hashlib.sha256(json.dumps(list(cuts)).encode()).hexdigest()}
        return Copy(self, self.folder / key / f"{rank}-of-{size}.safetensors", facts, size)

    def make_room(self, num_bytes: int, keep: Path) -> bool:
        """Remove models, least recently used first, until `num_bytes` more fit; False when they never will."""
        if num_bytes > self.limit or num_bytes > shutil.disk_usage(self.folder).free // 2:
            return False
        others = [path for path in self.folder.iterdir() if path.is_dir() and path != keep]
        sizes = {path: _size(path) for path in others}
        for path in sorted(others, key=_last_used):
            if sum(sizes.values()) + num_bytes <= self.limit:
                break
            shutil.rmtree(path, ignore_errors=True)
            log.info("removed a model's cut weights to make room", extra={"bytes": sizes.pop(path), "limit": self.limit})
        return sum(sizes.values()) + num_bytes <= self.limit


@dataclass(frozen=True)
class Copy:
    """One rank's file, there or not."""

    copies: Copies
    path: Path
    facts: Mapping[str, Any]
    size: int  # ranks

    def read(self, shapes: Mapping[str, tuple[int, ...]], progress: Progress) -> dict[str, Tensor] | None:
        """Every tensor, each checked; None when there is no good file with exactly these."""
        if not self.path.exists():
            return None
        try:
            found = self._read(shapes, progress)
            os.utime(self.path.parent)
        except (OSError, ValueError, KeyError, ModelNotServable) as error:
            log.warning("cut weights ignored", extra={"file": str(self.path), "reason": str(error)})
            self.path.unlink(missing_ok=True)
            return None
        return found

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep them if they are worth it and there is room."""
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if num_bytes < WORTH_BYTES:
            return
        try:
            folder = private_directory(private_directory(self.copies.folder) / self.path.parent.name)
            if not self.copies.make_room(num_bytes * self.size, folder):
                log.info("cut weights are not kept: no room", extra={"bytes": num_bytes, "limit": self.copies.limit})
                return
            self._write(tensors)
        except (OSError, SettingsError) as error:
            log.warning("cut weights could not be kept", extra={"file": str(self.path), "reason": str(error)})

    def _read(self, shapes: Mapping[str, tuple[int, ...]], progress: Progress) -> dict[str, Tensor]:
        entries = read_header(self.path)
        metadata = _metadata(self.path)
        if json.loads(metadata["facts"]) != self.facts:
            raise ValueError("it holds something else")
        if {name: entry.shape for name, entry in entries.items()} != shapes:
            raise ValueError("its tensors are not those of the model")
        sums = json.loads(metadata["crc32"])
        files = MappedFiles(entries, dict.fromkeys(entries, self.path))
        parts = {name: files.part(name, None, None, progress) for name in entries}
        progress.begin("copy", sum(part.num_bytes for part in parts.values()))

        def take(name: str) -> Tensor:
            tensor = parts[name][...]
            if _crc(tensor) != sums[name]:
                raise ValueError(f"{name} is damaged")
            return tensor

        with ThreadPoolExecutor(_READERS) as readers:
            tensors = dict(zip(parts, readers.map(take, parts), strict=True))
        progress.end()
        return tensors

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        """Whole or not at all; a file that a power cut tore fails its check."""
        header: dict[str, Any] = {}
        end = 0
        for name, tensor in tensors.items():
            header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
            end += tensor.nbytes
        sums = {name: _crc(tensor) for name, tensor in tensors.items()}
        header["__metadata__"] = {"facts": json.dumps(self.facts), "crc32": json.dumps(sums)}
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        handle, name = tempfile.mkstemp(prefix=".", dir=self.path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                for tensor in tensors.values():
                    file.write(_bytes(tensor))
            Path(name).replace(self.path)
        finally:
            Path(name).unlink(missing_ok=True)
        log.info("cut weights kept for the next start", extra={"file": str(self.path), "bytes": end})


def _metadata(path: Path) -> dict[str, str]:
    """Of a file whose header has been checked."""
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return dict(header.get("__metadata__") or {})


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(_bytes(tensor))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _last_used(folder: Path) -> float:
    return folder.stat().st_mtime
