"""How far a rank's load is: bytes and bandwidth, counted as they arrive, for logs and for whoever asks. Knows no files."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

log = logging.getLogger(__name__)

LOG_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """A moment of a load. Bytes are those of the files, as they are stored there."""

    bytes_read: int
    bytes_total: int  # 0 until it is known what this rank needs
    seconds: float
    source: str  # "" before it begins, then "model", "copy" (this rank's own from an earlier start) or "whole"

    @property
    def bytes_per_second(self) -> float:
        return self.bytes_read / self.seconds if self.seconds else 0.0


class Progress:
    """Counts for one rank. Written by the threads that read, asked from any other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read = self._total = 0
        self._source = ""
        self._began = self._logged = 0.0
        self._ended: float | None = None

    def begin(self, source: str, bytes_total: int) -> None:
        with self._lock:
            self._read, self._total, self._source, self._ended = 0, bytes_total, source, None
            self._began = self._logged = time.monotonic()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._read += num_bytes
            now = time.monotonic()
            due = now - self._logged >= LOG_EVERY_S
            self._logged = now if due else self._logged
        if due:
            self._log("loading weights")

    def end(self) -> None:
        with self._lock:
            self._ended = time.monotonic()
        self._log("weights loaded")

    def now(self) -> Loaded:
        with self._lock:
            seconds = (self._ended or time.monotonic()) - self._began if self._began else 0.0
            return Loaded(self._read, self._total, seconds, self._source)

    def _log(self, event: str) -> None:
        found = self.now()
        facts = {"bytes": found.bytes_read, "of": found.bytes_total, "from": found.source}
        log.info(event, extra=facts | {"seconds": round(found.seconds, 3), "mb_per_s": round(found.bytes_per_second / 1e6)})
