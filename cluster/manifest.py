"""What was published: every file's size and digest. Pure bytes, no file systems beyond reading a local folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.errors import StorageError

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class File:
    """One file of a manifest."""

    size: int  # bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Relative posix path -> size and digest, for every file of one published thing."""

    files: dict[str, File]

    @classmethod
    def of(cls, directory: str | Path) -> Manifest:
        """Hash a local directory. Raises StorageError for links and other special files: what is published is plain bytes."""
        return cls({name: _measure(path) for name, path in sorted(_walk(Path(directory)))})

    @classmethod
    def parse(cls, text: bytes) -> Manifest:
        try:
            files = {name: File(int(entry["size"]), str(entry["sha256"])) for name, entry in json.loads(text)["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"a manifest is not readable: {error}") from error
        for name in files:
            _check_relative(name)
        return cls(files)

    def to_bytes(self) -> bytes:
        files = {name: {"size": file.size, "sha256": file.sha256} for name, file in sorted(self.files.items())}
        return json.dumps({"files": files}, indent=1, sort_keys=True).encode() + b"\n"

    @property
    def address(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files.values())


def _check_relative(name: str) -> None:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name or "\0" in name:
        raise StorageError(f"{name!r} is not a file name that a manifest may hold")


def _walk(directory: Path) -> Iterator[tuple[str, Path]]:
    for path in directory.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StorageError(f"{path} is a link or a special file; only plain files are published")
        if path.is_file():
            name = path.relative_to(directory).as_posix()
            _check_relative(name)
            yield name, path


def _measure(path: Path) -> File:
    with path.open("rb") as stream:
        return digest(stream)


def digest(source: Any, sink: Any = None) -> File:
    """Read a stream to its end, copying it to `sink` on the way."""
    sha256, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK_BYTES):
        sha256.update(chunk)
        size += len(chunk)
        if sink is not None:
            sink.write(chunk)
    return File(size, sha256.hexdigest())
