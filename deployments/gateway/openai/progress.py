"""What has come of an answer so far. An answer that ends without a reason for every choice, or without usage, is a broken one.

A choice that the model failed on is an error of that choice alone. Whole answers leave it out, and are an error themselves when no
choice is left; streams end with the error after everything else was said.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.errors import ModelError, ReplicaLost
from cluster.types import Chunk, Delta, FinishReason, TokenLogprob, ToolCall, ToolCallDelta, Usage


class Progress:
    """Counts down the choices and adds up usage over the calls that make one answer."""

    def __init__(self, choices: int) -> None:
        self._choices, self._unfinished = choices, set(range(choices))
        self._usage: Usage | None = None
        self._failed: set[int] = set()

    @property
    def has_failed(self) -> bool:
        """Whether the model failed on every choice."""
        return len(self._failed) == self._choices

    @property
    def failure(self) -> ModelError | None:
        """What came of the choices that the model failed on."""
        if not self._failed:
            return None
        which = ", ".join(map(str, sorted(self._failed)))
        return ModelError(f"The model can't continue this text: no token can be chosen (choice {which}).")

    def add(self, chunk: Chunk) -> None:
        """Raises ReplicaLost when the engine gave a choice up."""
        for delta in chunk.deltas:
            if delta.finish_reason == "abort":
                raise ReplicaLost("The model stopped working on this request.", retry_after_s=1.0)
            if delta.finish_reason is not None:
                self._unfinished.discard(delta.index)
            if delta.finish_reason == "error":
                self._failed.add(delta.index)
        if chunk.usage is not None:
            self._usage = chunk.usage if self._usage is None else _sum(self._usage, chunk.usage)

    def usage(self) -> Usage:
        """Raises ReplicaLost when the stream ended before its end."""
        if self._unfinished or self._usage is None:
            raise ReplicaLost("The model's answer ended early.", retry_after_s=1.0)
        return self._usage


@dataclass(slots=True)
class Choice:
    """One choice, put together."""

    parts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    calls: dict[int, list[ToolCallDelta]] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "".join(self.parts)

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Calls in the order of the model, those that came to nothing left out."""
        whole = [(news[0], "".join([part.arguments for part in news])) for _, news in sorted(self.calls.items())]
        return [ToolCall(first.id, first.name, arguments) for first, arguments in whole if first.id and first.name]

    def add(self, delta: Delta) -> None:
        self.parts.append(delta.text)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason or self.finish_reason
        for news in delta.tool_calls:
            if news.broken:
                self.calls.pop(news.index, None)
            else:
                self.calls.setdefault(news.index, []).append(news)


class Collected:
    """A whole answer, for callers that don't stream."""

    def __init__(self, choices: int) -> None:
        self.choices = [Choice() for _ in range(choices)]
        self._progress = Progress(choices)

    def add(self, chunk: Chunk) -> None:
        self._progress.add(chunk)
        for delta in chunk.deltas:
            self.choices[delta.index].add(delta)

    def usage(self) -> Usage:
        """Raises ReplicaLost when the answer isn't whole."""
        return self._progress.usage()

    def good(self) -> list[tuple[int, Choice]]:
        """The choices that the model didn't fail on, with their indices. Raises ModelError when there is none."""
        good = [(index, choice) for index, choice in enumerate(self.choices) if choice.finish_reason != "error"]
        if self._progress.failure and not good:
            raise self._progress.failure
        return good


def _sum(a: Usage, b: Usage) -> Usage:
    return Usage(
        a.prompt_tokens + b.prompt_tokens,
        a.completion_tokens + b.completion_tokens,
        a.cached_tokens + b.cached_tokens,
        a.from_cache and b.from_cache,
        a.compute_us + b.compute_us,
    )
