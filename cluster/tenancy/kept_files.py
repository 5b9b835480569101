"""Kept calls as Parquet files: HOME/kept/PROJECT/DAY/FIRST-LAST-RANDOM.parquet, with the milliseconds of the first and last call.

A request's identifier says when it came (UUIDv7), so its file is found by name. Files appear whole or not at all, readable by the
platform's user alone. Knows nothing of consents.
"""

from __future__ import annotations

import datetime
import io
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from cluster.errors import InvalidRequest, NotFound
from cluster.private_files import private_directory, write_private
from cluster.types import NAME

_REQUEST = re.compile(r"req_[0-9a-f]{32}\Z")
_FILE = re.compile(r"(\d+)-(\d+)-[0-9a-f]{8}\.parquet\Z")


@dataclass(frozen=True, slots=True)
class KeptCall:
    """One call as it was, or as a redaction left it. `input` and `output` are JSON texts; `at` is seconds since the epoch."""

    request_id: str
    at: float
    tenant: str
    key_id: str
    operation: str
    model: str
    status: int
    is_complete: bool  # False: the caller left, or the answer broke off
    input: str
    output: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def milliseconds(self) -> int:
        return int(self.request_id[4:16], 16)


class KeptFiles:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, calls: Iterable[KeptCall]) -> list[Path]:
        """One file for each project and day, durable when this returns."""
        ordered = sorted(calls, key=lambda call: (call.tenant, call.request_id))
        groups = groupby(ordered, key=lambda call: (call.tenant, _day(call.milliseconds)))
        return [self._write(tenant, day, list(group)) for (tenant, day), group in groups]

    def _write(self, tenant: str, day: str, calls: list[KeptCall]) -> Path:
        import pyarrow as pa
        from pyarrow import parquet

        folder = private_directory(private_directory(self._folder(tenant)) / day)
        table = pa.Table.from_pylist([asdict(call) for call in calls], schema=_schema())
        data = io.BytesIO()
        parquet.write_table(table, data, compression="zstd")
        path = folder / f"{calls[0].milliseconds}-{calls[-1].milliseconds}-{secrets.token_hex(4)}.parquet"
        write_private(path, data.getvalue())
        return path

    def find(self, tenant: str, request_id: str) -> KeptCall:
        """Raises NotFound, alike for a call that was never kept and for another project's."""
        from pyarrow import parquet

        absent = NotFound(f"No call {request_id[:64]!r} of this project is kept.", param="request_id")
        if _REQUEST.match(request_id) is None:
            raise absent
        at = int(request_id[4:16], 16)
        for path, first, last in _files(self._folder(tenant) / _day(at)):
            if first <= at <= last:
                rows = parquet.read_table(path, schema=_schema(), filters=[("request_id", "==", request_id)]).to_pylist()
                if rows:
                    return KeptCall(**rows[0])
        raise absent

    def expire(self, keep_s: Mapping[str, float], default_s: float, now: float) -> int:
        """Remove what is older than its project's time; returns how many files."""
        removed = 0
        for folder in self._directory.glob("*/*"):
            longest = keep_s.get(folder.parent.name, default_s)
            for path, _, last in _files(folder):
                if last / 1000 + longest < now:
                    path.unlink(missing_ok=True)
                    removed += 1
            if removed and not any(folder.iterdir()):
                folder.rmdir()
        return removed

    def forget(self, tenant: str) -> None:
        """Remove all of a project, now."""
        folder = self._folder(tenant)
        if folder.exists():
            shutil.rmtree(folder)

    def _folder(self, tenant: str) -> Path:
        if NAME.match(tenant) is None:
            raise InvalidRequest(f"{tenant[:64]!r} is not a project", param="tenant")
        return private_directory(self._directory) / tenant


def _files(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """A folder's files with the times of their first and last calls."""
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if match := _FILE.match(path.name):
                yield path, int(match[1]), int(match[2])


def _day(milliseconds: int) -> str:
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC).strftime("%Y-%m-%d")


def _schema() -> Any:
    import pyarrow as pa

    text = ("request_id", "tenant", "key_id", "operation", "model", "input", "output")
    kinds = {"at": pa.float64(), "status": pa.int32(), "is_complete": pa.bool_()} | dict.fromkeys(text, pa.string())
    kinds |= {"prompt_tokens": pa.int64(), "completion_tokens": pa.int64()}
    return pa.schema([(name, kinds[name]) for name in KeptCall.__dataclass_fields__])
