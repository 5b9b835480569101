"""From an engine's tokens to the text of one answer: one detokeniser for each choice, stop strings, log probabilities, usage.

Pure: no socket, no event loop. The engine knows ids, the gateway knows JSON, this knows both sides' words for the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cluster.types import Chunk, Delta, FinishReason, TokenLogprob, TopLogprob, Usage
from deployments.engine.detokenizer import Detokenizer
from deployments.engine.engine import Output, Request
from deployments.engine.sequence import NO_TOKEN
from deployments.engine.tokenizer import Tokenizer


class Answer:
    """The choices of one request. `stop_choice(index)` is called when a choice's text meets a stop string."""

    def __init__(self, tokenizer: Tokenizer, request: Request, *, is_chat: bool, stop_choice: Callable[[int], None]) -> None:
        self._tokenizer = tokenizer
        self._request = request
        self._stop_choice = stop_choice
        before = () if is_chat else request.prompt  # after a template the first word loses its space
        stop = request.sampling.stop
        self._texts = [Detokenizer(tokenizer, stop, prompt_ids=before) for _ in range(request.sampling.n)]
        self._open = set(range(request.sampling.n))
        self._num_tokens = 0
        self._num_cached = 0

    def take(self, outputs: Iterable[Output]) -> Chunk:
        """What these outputs add to the answer; the last chunk carries the usage."""
        by_choice: dict[int, list[Output]] = {}
        for output in outputs:
            if output.index in self._open:
                by_choice.setdefault(output.index, []).append(output)
        deltas = tuple(self._delta(index, items) for index, items in sorted(by_choice.items()))
        return Chunk(deltas, None if self._open else self.usage)

    @property
    def usage(self) -> Usage:
        return Usage(len(self._request.prompt), self._num_tokens, self._num_cached)

    def _delta(self, index: int, outputs: list[Output]) -> Delta:
        detokenizer, reason = self._texts[index], outputs[-1].finish_reason
        self._num_cached = max(self._num_cached, outputs[0].cached) if index == 0 else self._num_cached
        outputs = [output for output in outputs if output.token != NO_TOKEN]
        news = detokenizer.push([output.token for output in outputs])
        text = news.text
        if reason and not news.stopped:
            text += detokenizer.finish().text
        if detokenizer.stopped:
            if reason is None:
                self._stop_choice(index)
            reason = "stop"
        return self._closed(index, outputs[: news.num_tokens], text, reason)

    def _closed(self, index: int, outputs: list[Output], text: str, reason: FinishReason | None) -> Delta:
        self._num_tokens += len(outputs)
        if reason:
            self._open.discard(index)
        logprobs = tuple(self._logprob(output) for output in outputs if output.logprob is not None)
        return Delta(index, text, tuple(output.token for output in outputs), logprobs, reason)

    def _logprob(self, output: Output) -> TokenLogprob:
        name, raw = self._tokenizer.token_text, self._tokenizer.token_bytes
        assert output.logprob is not None
        top = tuple(TopLogprob(name(token), raw(token), value) for token, value in output.top)
        return TokenLogprob(name(output.token), raw(output.token), output.logprob, top)
