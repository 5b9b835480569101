"""Keeps a sample of calls for projects that consented: taken beside the request, redacted and written by a thread of its own.

`offer` never waits: the queue is bounded in bytes, and what finds no room is dropped and counted (`mmaas_kept_calls_total`). A call
that can't be read or whose redaction fails is dropped, too: nothing is written that was to be redacted and isn't. A process that
is killed loses what waits.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster import metrics
from cluster.tenancy.consents import DAY_S, Consent
from cluster.tenancy.kept_files import KeptCall, KeptFiles
from cluster.tenancy.redaction import Redaction

logger = logging.getLogger(__name__)

QUEUE_BYTES = 32 << 20
CALL_BYTES = 1 << 20
"""Longest input and longest output that are kept."""

DEFAULT_S = 30 * DAY_S
MAX_TEXT_DEPTH = 64
_PIECES = frozenset({"logprobs", "top_logprobs"})
"""Fields with a text in pieces, which no pattern finds: left out of what is redacted."""


class Keeper:
    """`consents` asks the store and may block; it is called from `refresh` and `write` alone."""

    def __init__(
        self,
        files: KeptFiles,
        consents: Callable[[], Sequence[Consent]],
        redactions: Mapping[str, Redaction],
        *,
        queue_bytes: int = QUEUE_BYTES,
        call_bytes: int = CALL_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.call_bytes = call_bytes
        self._files = files
        self._ask = consents
        self._redactions = redactions
        self._clock = clock
        self._consents: Mapping[str, Consent] = {}
        self._queue: deque[KeptCall] = deque()
        self._room = queue_bytes
        self._lock = threading.Lock()

    def wants(self, tenant: str, request_id: str) -> bool:
        """Whether the project consented and this call is in its sample, as far as is known here: a second late at most."""
        consent = self._consents.get(tenant)
        return consent is not None and consent.takes(request_id)

    def offer(self, call: KeptCall) -> None:
        """Take it if there is room. `output` may be an event stream as it went out."""
        size = len(call.input) + len(call.output)
        with self._lock:
            fits = size <= self._room
            if fits:
                self._room -= size
                self._queue.append(call)
        if not fits:
            drop("queue_full")

    def refresh(self) -> None:
        """Learn who consents. When that can't be known nobody does."""
        try:
            self._consents = {consent.tenant: consent for consent in self._ask() if consent.share > 0}
        except Exception:
            self._consents = {}
            raise

    def write(self) -> int:
        """Everything that waits; returns how many calls were written."""
        calls = self._taken()
        if not calls:
            return 0
        try:
            self.refresh()
            ready = [made for call in calls if (made := self._made(call)) is not None]
            self._files.write(ready)
        except Exception:
            drop("failed", len(calls))
            raise
        metrics.KEPT.labels("written").inc(len(ready))
        return len(ready)

    def expire(self) -> int:
        """Remove what is older than its project allows; returns how many files."""
        return self._files.expire({one.tenant: one.keep_s for one in self._ask()}, DEFAULT_S, self._clock())

    def _taken(self) -> list[KeptCall]:
        with self._lock:
            calls = list(self._queue)
            self._queue.clear()
            self._room += sum(len(call.input) + len(call.output) for call in calls)
        return calls

    def _made(self, call: KeptCall) -> KeptCall | None:
        consent = self._consents.get(call.tenant)
        if consent is None:
            drop("withdrawn")
            return None
        try:
            told, said = json.loads(call.input), answer_of(call.output)
            if consent.redaction is not None:
                redact = self._redactions[consent.redaction]
                told, said = redacted(told, redact), redacted(said, redact)
            return replace(call, input=_json(told), output=_json(said))
        except Exception as error:  # whatever a redaction raises: its message may quote what it should have hidden
            reason = type(error).__name__
            logger.warning("a call could not be redacted and is not kept", extra={"request_id": call.request_id, "reason": reason})
            drop("unreadable")
            return None


def drop(outcome: str, many: int = 1) -> None:
    metrics.KEPT.labels(outcome).inc(many)


def answer_of(output: str) -> Any:
    """An answer's JSON. A stream is put together, so that no pattern is lost between two pieces of text."""
    if not output.startswith(("data:", ":")):
        return json.loads(output)
    choices: dict[int, dict[str, Any]] = {}
    whole: dict[str, Any] = {}
    for line in output.split("\n"):
        if line.startswith("data:") and line != "data: [DONE]":
            event = json.loads(line.removeprefix("data:"))
            whole |= {name: event[name] for name in ("id", "model", "usage", "error") if event.get(name) is not None}
            for choice in event.get("choices", ()):
                _add(choices.setdefault(choice["index"], {"index": choice["index"], "content": ""}), choice)
    return {**whole, "choices": [_ended(choices[index]) for index in sorted(choices)]}


def _ended(choice: dict[str, Any]) -> dict[str, Any]:
    calls = choice.pop("tool_calls", None)
    return {**choice, "tool_calls": list(calls.values())} if calls else choice


def _add(whole: dict[str, Any], choice: Mapping[str, Any]) -> None:
    delta = choice.get("delta", {})
    whole["content"] += delta.get("content") or choice.get("text") or ""
    if choice.get("finish_reason"):
        whole["finish_reason"] = choice["finish_reason"]
    for call in delta.get("tool_calls") or ():
        calls = whole.setdefault("tool_calls", {})
        made = calls.setdefault(str(call["index"]), {"name": "", "arguments": ""})
        for name in made:
            made[name] += call.get("function", {}).get(name) or ""


def redacted(tree: Any, redact: Redaction, depth: int = MAX_TEXT_DEPTH) -> Any:
    """The same tree with every text redacted, and without what holds text that no pattern can read."""
    if depth == 0:
        raise RecursionError("deeper than any body may be")
    if isinstance(tree, str):
        return redact(tree)
    if isinstance(tree, dict):
        return {redact(name): redacted(value, redact, depth - 1) for name, value in tree.items() if name not in _PIECES}
    if isinstance(tree, list):
        if tree and all(type(item) is int for item in tree):
            return f"[{len(tree)} token ids]"
        return [redacted(item, redact, depth - 1) for item in tree]
    return tree


def _json(tree: Any) -> str:
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":"))
