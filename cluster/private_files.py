"""Files that only the platform's user may read: secrets under HOME, made on first use, and how any private file is written.

Directories get mode 0700, files 0600, whatever the umask is. A file appears complete or not at all.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from pathlib import Path

from cluster.errors import SettingsError


def private_directory(path: Path) -> Path:
    """Make `path` if missing, with mode 0700. Raises SettingsError when it belongs to somebody else."""
    make_private(path)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise SettingsError(f"{path} is not a directory of user {os.getuid()}; remove it or choose another home")
    path.chmod(0o700)
    return path


def make_private(path: Path) -> None:
    """Make `path` with mode 0700 if it is missing. One that is there stays as its owner wants it: a library on a disk
    that several machines share may well be open to a group."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def write_private(path: Path, data: bytes) -> None:
    """Replace `path` in one step by a file of mode 0600, durable when this returns."""
    temporary = _write_beside(path, data)
    temporary.replace(path)
    _sync_directory(path.parent)


def read_private(path: Path) -> bytes:
    """Raises SettingsError when other users may read or write the file: what they may have read is no secret."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise SettingsError(f"{path} has mode {mode:04o}, so others may have read it; replace it, or run: chmod 600 {path}")
    return path.read_bytes()


class Secrets:
    """The platform's own secrets in HOME/secrets. Each is 256 random bits in hexadecimal, made once."""

    def __init__(self, home: Path) -> None:
        self._directory = home / "secrets"

    @property
    def pepper(self) -> bytes:
        """Key of the HMACs under which API keys are stored: a copy of the database alone proves no key."""
        return read_private(self._made("pepper"))

    @property
    def prefix_cache(self) -> bytes:
        """Seeds the hashes of KV blocks with the tenant, so that no tenant can find another's prompts by timing."""
        return read_private(self._made("prefix-cache"))

    @property
    def audit_key(self) -> bytes:
        """Seed of the Ed25519 key that signs how far the audit log has come: 32 bytes."""
        return bytes.fromhex(read_private(self._made("audit-key")).decode())

    @property
    def ray_token_path(self) -> Path:
        """File with the token of the Ray cluster, which is its administrator's password."""
        read_private(path := self._made("ray-token"))
        return path

    def _made(self, name: str) -> Path:
        path = private_directory(self._directory) / name
        if not path.exists():
            _create_once(path, secrets.token_hex(32).encode())
        return path


def _create_once(path: Path, data: bytes) -> None:
    """Of several processes that create the file at once, the first one's content stays and all see it."""
    temporary = _write_beside(path, data)
    try:
        os.link(temporary, path)
        _sync_directory(path.parent)
    except FileExistsError:
        return
    finally:
        temporary.unlink()


def _write_beside(path: Path, data: bytes) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mkstemp makes the file with mode 0600
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Path(name)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
