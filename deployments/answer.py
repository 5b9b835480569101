"""From an engine's tokens to the text of one answer: one detokeniser for each choice, stop strings, log probabilities, usage.

Pure: no socket, no event loop. The engine knows ids, the gateway knows JSON, this knows both sides' words for the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from cluster.types import Chunk, Delta, TokenLogprob, TopLogprob, Usage
from deployments.engine.detokenizer import Detokenizer
from deployments.engine.messages import Output, Request
from deployments.engine.sequence import NO_TOKEN
from deployments.engine.tokenizer import Tokenizer
from deployments.tools.spoken import Spoken
from deployments.tools.stream import CallStream, News


class Answer:
    """The choices of one request. `stop_choice(index)` is called when a choice's text meets a stop string, or has the one call that
    was wanted."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: Request,
        *,
        is_chat: bool,
        stop_choice: Callable[[int], None],
        calls: Sequence[CallStream] = (),
        shown: Mapping[int, str] | None = None,
    ) -> None:
        """`calls`: for each choice what finds calls in its text, if there may be any; `shown`: special tokens that it needs."""
        self._tokenizer = tokenizer
        self._request = request
        self._stop_choice = stop_choice
        before = () if is_chat else request.prompt  # after a template the first word loses its space
        stop = request.sampling.stop
        self._texts = [Detokenizer(tokenizer, stop, prompt_ids=before, shown=shown) for _ in range(request.sampling.n)]
        self._calls = calls
        self._spoken = [Spoken(tokenizer, shown or {}) for _ in calls]
        self._open = set(range(request.sampling.n))
        self._num_tokens = 0
        self._num_cached = 0
        self._compute_us = [0] * request.sampling.n
        self._told_us = 0
        self._has_begun = False

    def take(self, outputs: Iterable[Output]) -> Chunk:
        """What these outputs add to the answer; the first chunk says what its prompt takes, the last one carries the usage."""
        by_choice: dict[int, list[Output]] = {}
        for output in outputs:
            if output.index in self._open:
                by_choice.setdefault(output.index, []).append(output)
        deltas = tuple(self._delta(index, items) for index, items in sorted(by_choice.items()))
        before, self._told_us = self._told_us, sum(self._compute_us)
        begun = self._begun() if deltas else None
        return Chunk(deltas, None if self._open else self.usage, begun, self._told_us - before)

    @property
    def usage(self) -> Usage:
        return Usage(len(self._request.prompt), self._num_tokens, self._num_cached, compute_us=self._told_us)

    def _begun(self) -> Usage | None:
        """Once."""
        if self._has_begun:
            return None
        self._has_begun = True
        return Usage(len(self._request.prompt), 0, self._num_cached)

    def _delta(self, index: int, outputs: list[Output]) -> Delta:
        detokenizer, reason = self._texts[index], outputs[-1].finish_reason
        self._num_cached = max(self._num_cached, outputs[0].cached) if index == 0 else self._num_cached
        self._compute_us[index] = outputs[-1].compute_us
        outputs = [output for output in outputs if output.token != NO_TOKEN]
        news = detokenizer.push([output.token for output in outputs])
        text = news.text
        if reason and not news.stopped:
            text += detokenizer.finish().text
        if detokenizer.stopped:
            if reason is None:
                self._stop_choice(index)
            reason = "stop"
        outputs = outputs[: news.num_tokens]
        self._count(index, outputs)
        delta = Delta(index, text, tuple(output.token for output in outputs), self._logprobs(outputs), reason)
        if self._calls:
            delta = self._without_calls(delta)
        if delta.finish_reason:
            self._open.discard(index)
        return delta

    def _without_calls(self, delta: Delta) -> Delta:
        """The same with its calls taken out of the text. What isn't text has no log probabilities."""
        calls, reason = self._calls[delta.index], delta.finish_reason
        news = calls.push(delta.text)
        if calls.has_enough and reason is None:
            self._stop_choice(delta.index)
            reason = "stop"
        if reason:
            news = news.then(calls.finish(cut=reason != "stop"))
            reason = "tool_calls" if reason == "stop" and calls.has_calls else reason
        return Delta(delta.index, news.text, delta.token_ids, self._of_text(delta, news), reason, news.calls)

    def _of_text(self, delta: Delta, news: News) -> tuple[TokenLogprob, ...]:
        if self._request.sampling.logprobs is None:
            return ()
        spoken = self._spoken[delta.index]
        for token, logprob in zip(delta.token_ids, delta.logprobs, strict=True):
            spoken.add(token, logprob)
        return tuple(spoken.take(news.spans, at_end=delta.finish_reason is not None))

    def _count(self, index: int, outputs: list[Output]) -> None:
        self._num_tokens += len(outputs)

    def _logprobs(self, outputs: list[Output]) -> tuple[TokenLogprob, ...]:
        return tuple(self._logprob(output) for output in outputs if output.logprob is not None)

    def _logprob(self, output: Output) -> TokenLogprob:
        name, raw = self._tokenizer.token_text, self._tokenizer.token_bytes
        assert output.logprob is not None
        top = tuple(TopLogprob(name(token), raw(token), value) for token, value in output.top)
        return TokenLogprob(name(output.token), raw(output.token), output.logprob, top)
