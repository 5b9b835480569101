"""Files on any pyarrow filesystem, published whole or not at all, and checked against a sha256 manifest.

    ROOT/objects/ADDRESS/files/…         the files of one thing
    ROOT/objects/ADDRESS/manifest.json   their sizes and digests; ADDRESS is its sha256
    ROOT/names/NAME                      the address that a name stands for
    ROOT/staging/…                       what is being written or thrown away; nobody reads it

The name is the commit point: it changes in one step, after everything under the address is on disk. A crash before that step leaves
the old thing, a crash after it the new one, and nothing is ever written into an object that a name stands for. This module knows
nothing of models or of MLflow. Names are made by the server, never taken from a client.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path, PurePosixPath
from typing import IO

from cluster.errors import InvalidRequest, NotFound, StorageError
from cluster.manifest import File, Manifest, digest
from cluster.private_files import make_private, private_directory
from cluster.types import NAME


class Storage:
    """A root folder given by a local path or a pyarrow URI (`file:///…`, `s3://bucket/…`, `gs://…`, `hdfs://…`).

    On a local disk every file and folder is fsynced before the name changes. On an object store a put is whole and durable by
    itself. One publisher per name; any number of readers.
    """

    def __init__(self, uri: str | Path, cache: str | Path | None = None) -> None:
        """`cache` is the folder that `fetch` copies remote files into (default: one for this user below the temporary folder).
        A local root that is missing is made so that only its user may enter it."""
        from pyarrow import fs

        text = str(uri) if "://" in str(uri) else str(Path(uri).absolute())
        self._fs, root = fs.FileSystem.from_uri(text)
        self._root = root.rstrip("/")
        self.is_local = self._fs.type_name == "local"
        self.uri = Path(self._root).as_uri() if self.is_local else text.rstrip("/")
        self._cache = Path(cache) if cache else Path(tempfile.gettempdir()) / f"mmaas-storage-{os.getuid()}"
        if self.is_local:
            make_private(Path(self._root))
        for folder in ("objects", "names", "staging"):
            self._fs.create_dir(self._path(folder), recursive=True)

    def publish(self, directory: str | Path, name: str | None = None) -> Manifest:
        """Copy a local directory in and let `name` stand for it (None: half of its address). Replaces what the name stood for;
        the same bytes again change nothing. Raises StorageError when a file changes meanwhile or is no plain file."""
        manifest = Manifest.of(directory)
        if not manifest.files:
            raise StorageError(f"{directory} holds no file to publish")
        name = _checked(name or name_of(manifest.address))
        if not self._is_whole(manifest):
            self._discard(f"objects/{manifest.address}")
            self._place(Path(directory), manifest)
        self._point(name, manifest.address)
        return manifest

    def list(self) -> builtins.list[str]:
        from pyarrow import fs

        found = self._fs.get_file_info(fs.FileSelector(self._path("names")))
        return sorted(info.base_name for info in found if NAME.match(info.base_name))

    def manifest(self, name: str) -> Manifest:
        """Raises NotFound for an unknown name, StorageError when the manifest itself is missing or torn."""
        address = self._address(name)
        manifest = Manifest.parse(self._read(f"objects/{address}/manifest.json"))
        if manifest.address != address:
            raise StorageError(f"{name}: the manifest does not match its address {address}")
        return manifest

    def verify(self, name: str) -> Manifest:
        """Read every byte. Raises StorageError that names the files that are missing or don't match."""
        manifest = self.manifest(name)
        if broken := [file for file in manifest.files if not self._matches(manifest, file)]:
            raise StorageError(
                f"{name}: {len(broken)} of {len(manifest.files)} files are missing or damaged: {', '.join(broken[:5])}"
            )
        return manifest

    def fetch(self, name: str) -> Path:
        """A local directory with the verified files: their own place on a local disk (never write there), else a cached copy."""
        manifest = self.verify(name)
        if self.is_local:
            return Path(self._path(f"objects/{manifest.address}/files"))
        target = private_directory(self._cache) / manifest.address  # checked files stay as they are: no other user may swap one
        if not (target.is_dir() and Manifest.of(target) == manifest):
            self._download(manifest, target)
        return target

    def object_uri(self, name: str) -> str:
        """Where a name's files are, for people and other tools."""
        return f"{self.uri}/objects/{self._address(name)}/files"

    def delete(self, name: str) -> None:
        """Forget a name; `sweep` frees the space. Raises NotFound for an unknown one."""
        self._address(name)
        self._fs.delete_file(self._path(f"names/{name}"))
        self._sync("names")

    def sweep(self, older_than_s: float = 3600.0) -> int:
        """Remove what no name stands for and what a crash left behind; returns how many things went. Young ones stay, for they
        may belong to a publisher at work: pass 0 only where this process is the only publisher."""
        from pyarrow import fs

        named = {self._address(name) for name in self.list()}
        found = [info for folder in ("objects", "staging") for info in self._fs.get_file_info(fs.FileSelector(self._path(folder)))]
        latest = time.time() - older_than_s
        garbage = [
            info for info in found if info.base_name not in named and (info.mtime is None or info.mtime.timestamp() <= latest)
        ]
        for info in garbage:
            self._discard(info.path.removeprefix(f"{self._root}/"))
        return len(garbage)

    # A thing gets its place: staged and renamed on a disk, written in place on an object store, where nobody reads without a name.

    def _place(self, directory: Path, manifest: Manifest) -> None:
        final = f"objects/{manifest.address}"
        target = f"staging/{uuid.uuid4().hex}" if self.is_local else final
        for name, file in manifest.files.items():
            with (directory / name).open("rb") as source:
                self._write(f"{target}/files/{name}", source, file)
        self._write_bytes(f"{target}/manifest.json", manifest.to_bytes())
        for folder in _folders(target, manifest):
            self._sync(folder)
        if target != final:
            self._settle(target, final, manifest)

    def _settle(self, staged: str, final: str, manifest: Manifest) -> None:
        try:
            self._move(staged, final)
        except OSError:
            if not self._is_whole(manifest):  # else somebody published the same bytes meanwhile
                raise
            self._fs.delete_dir(self._path(staged))
        self._sync("objects")

    def _point(self, name: str, address: str) -> None:
        temporary = f"staging/{uuid.uuid4().hex}" if self.is_local else f"names/{name}"
        self._write_bytes(temporary, address.encode())
        if self.is_local:
            self._move(temporary, f"names/{name}")
            self._sync("names")

    def _discard(self, path: str) -> None:
        """Take a damaged or forgotten thing away; on a disk by one rename first, so that no reader sees it shrink."""
        from pyarrow import fs

        kind = self._fs.get_file_info(self._path(path)).type
        if kind == fs.FileType.NotFound:
            return
        doomed = f"staging/{uuid.uuid4().hex}" if self.is_local else path
        if doomed != path:
            self._move(path, doomed)
        (self._fs.delete_dir if kind == fs.FileType.Directory else self._fs.delete_file)(self._path(doomed))

    def _is_whole(self, manifest: Manifest) -> bool:
        with contextlib.suppress(StorageError):
            stored = Manifest.parse(self._read(f"objects/{manifest.address}/manifest.json"))
            return stored == manifest and all(self._matches(manifest, name) for name in manifest.files)
        return False

    def _matches(self, manifest: Manifest, name: str) -> bool:
        with contextlib.suppress(OSError), self._fs.open_input_stream(self._file(manifest, name)) as stream:
            return digest(stream) == manifest.files[name]
        return False

    def _download(self, manifest: Manifest, target: Path) -> None:
        staging = self._cache / f".{uuid.uuid4().hex}"
        for name, expected in manifest.files.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            with self._fs.open_input_stream(self._file(manifest, name)) as source, (staging / name).open("wb") as sink:
                if digest(source, sink) != expected:
                    raise StorageError(f"{name} changed while it was fetched")
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)

    # Single steps: a crash falls between two of them or into one.

    def _write(self, path: str, source: IO[bytes], expected: File) -> None:
        self._fs.create_dir(self._path(str(PurePosixPath(path).parent)), recursive=True)
        with self._fs.open_output_stream(self._path(path)) as sink:
            if digest(source, sink) != expected:
                raise StorageError(f"{PurePosixPath(path).name} changed while it was published")
        self._sync(path)

    def _write_bytes(self, path: str, content: bytes) -> None:
        with self._fs.open_output_stream(self._path(path)) as sink:
            sink.write(content)
        self._sync(path)

    def _move(self, source: str, target: str) -> None:
        self._fs.move(self._path(source), self._path(target))

    def _sync(self, path: str) -> None:
        """A failed fsync is never tried again: the kernel may have dropped the pages, and a second one would report success."""
        if not self.is_local:
            return
        descriptor = os.open(self._path(path), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _read(self, path: str) -> bytes:
        try:
            with self._fs.open_input_stream(self._path(path)) as stream:
                return bytes(stream.read())
        except OSError as error:
            raise StorageError(f"{path} can't be read: {error}") from error

    def _address(self, name: str) -> str:
        from pyarrow import fs

        if self._fs.get_file_info(self._path(f"names/{_checked(name)}")).type == fs.FileType.NotFound:
            raise NotFound(f"nothing is stored under the name {name!r}")
        address = self._read(f"names/{name}").decode("ascii", "replace")
        if len(address) != 64 or set(address) - set("0123456789abcdef"):
            raise StorageError(f"{name}: its address is torn")
        return address

    def _file(self, manifest: Manifest, name: str) -> str:
        return self._path(f"objects/{manifest.address}/files/{name}")

    def _path(self, relative: str) -> str:
        return f"{self._root}/{relative}"


def name_of(address: str) -> str:
    """The name that content has when nobody gives it one: the first 128 bits of its address."""
    return address[:32]


def _checked(name: str) -> str:
    if NAME.match(name) is None:
        raise InvalidRequest(f"{name!r} is not a storage name", param="name")
    return name


def _folders(target: str, manifest: Manifest) -> builtins.list[str]:
    """Every folder of a staged thing, the deepest first."""
    parents = {parent for name in manifest.files for parent in PurePosixPath(target, "files", name).parents}
    return sorted((str(folder) for folder in parents if folder.is_relative_to(target)), key=len, reverse=True)
