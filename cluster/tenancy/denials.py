"""Denials for the audit log: all of them are counted, and what repeats is one record a minute.

Whoever is refused a thousand times a second must fill neither the log nor the time of those who write to it. So a denial is noted
in memory, and `write`, called from a thread of its own, appends. What is of one kind (who, what, why) is written when it first
happens and then once a `QUIET_S`, with how often and since when. A process that is killed loses what it noted in the last second.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.tenancy.audit import Audit
from cluster.tenancy.chain import Actor

QUIET_S = 60.0
MAX_KINDS = 256
"""Kinds that are told apart at once; further ones are counted together, so the log grows by so many records a minute at most."""


@dataclass(frozen=True, slots=True)
class Denial:
    """One kind of refusal. `code` is the public one; `target` is a route or an operation, never a caller's words."""

    actor: Actor
    code: str
    target: str
    status: int
    organization: str = ""
    project: str | None = None

    @property
    def action(self) -> str:
        return "login.failed" if self.status == 401 else "access.denied"


OTHERS = Denial(Actor("system", "gateway"), "various", "various", 403)


@dataclass(slots=True)
class _Noted:
    count: int
    first_at: float
    last_at: float
    request_id: str | None
    written_at: float | None = None


class Denials:
    """Safe to share between threads."""

    def __init__(self, audit: Audit, clock: Callable[[], float] = time.time) -> None:
        self._audit = audit
        self._clock = clock
        self._noted: dict[Denial, _Noted] = {}
        self._lock = threading.Lock()

    def note(self, denial: Denial, request_id: str | None = None) -> None:
        """Touches no disk."""
        now = self._clock()
        with self._lock:
            if denial not in self._noted and len(self._noted) >= MAX_KINDS:
                denial = OTHERS
            noted = self._noted.setdefault(denial, _Noted(0, now, now, request_id))
            if noted.count == 0:
                noted.first_at, noted.request_id = now, request_id
            noted.count += 1
            noted.last_at = now

    def write(self, *, everything: bool = False) -> int:
        """Append what is new or was quiet long enough, `everything` at the end of the process; returns how many records."""
        due = self._due(everything)
        for done, (denial, noted) in enumerate(due):
            try:
                self._append(denial, noted)
            except Exception:
                self._put_back(due[done:])
                raise
        return len(due)

    def _due(self, everything: bool) -> list[tuple[Denial, _Noted]]:
        now, due = self._clock(), []
        with self._lock:
            for denial, noted in list(self._noted.items()):
                was_quiet = noted.written_at is None or now - noted.written_at >= QUIET_S
                if noted.count and (was_quiet or everything):
                    due.append((denial, _Noted(noted.count, noted.first_at, noted.last_at, noted.request_id)))
                    noted.count, noted.written_at = 0, now
                elif was_quiet:
                    del self._noted[denial]
        return due

    def _put_back(self, due: list[tuple[Denial, _Noted]]) -> None:
        with self._lock:
            for denial, lost in due:
                noted = self._noted.setdefault(denial, _Noted(0, lost.first_at, lost.last_at, lost.request_id))
                noted.count += lost.count
                noted.first_at, noted.request_id, noted.written_at = lost.first_at, lost.request_id, None

    def _append(self, denial: Denial, noted: _Noted) -> None:
        told = {"code": denial.code, "status": denial.status, "count": noted.count}
        self._audit.record(
            *(denial.actor, denial.action, denial.target, None),
            {**told, "first_at": noted.first_at, "last_at": noted.last_at},
            organization=denial.organization,
            project=denial.project,
            request_id=noted.request_id,
        )
