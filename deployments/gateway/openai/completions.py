"""POST /v1/completions: prompts in, their continuations out. The choice of call `k`, candidate `i` has index `k * n + i`."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Literal

from cluster.errors import ModelError
from cluster.types import Chunk, Delta, Generate, Sampling, TokenLogprob, Usage
from deployments.gateway.openai import answers, unsupported
from deployments.gateway.openai.answers import Completion, Finish, TextChoice, TextLogprobs
from deployments.gateway.openai.progress import Collected, Progress
from deployments.gateway.openai.types import CompletionRequest, parse

DEFAULT_MAX_TOKENS = 16


class CompletionCall:
    """One request: what to ask of the model, and how to say what comes back."""

    prefix: Literal["cmpl-"] = "cmpl-"

    def __init__(self, body: dict[str, Any], *, request_id: str, answer_id: str, tenant: str, created: int) -> None:
        """Raises InvalidRequest."""
        unsupported.refuse(body, unsupported.COMPLETIONS)
        self.request = request = parse(CompletionRequest, body)
        request.check()
        self.model = request.model
        self.streams = bool(request.stream)
        self._prompts = request.prompts
        self.choices = request.choices * len(self._prompts)
        sampling = request.sampling(
            max_tokens=DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens, logprobs=request.logprobs
        )
        self.calls = tuple(self._generate(prompt, k, sampling, request_id, tenant) for k, prompt in enumerate(self._prompts))
        self._id, self._created = answer_id, created
        self._progress = Progress(self.choices)
        self._offsets = [_Offsets() for _ in range(self.choices)]
        self._started = False

    def _generate(self, prompt: str | list[int], k: int, sampling: Sampling, request_id: str, tenant: str) -> Generate:
        own_id = request_id if len(self._prompts) == 1 else f"{request_id}-{k}"  # an engine knows its calls by this
        given: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_ids": tuple(prompt)}
        request = self.request
        return Generate(own_id, tenant, **given, sampling=sampling, open=request.left_open, priority=request.priority)

    def whole(self, collected: Collected) -> Completion:
        spent = collected.usage()
        choices = [
            self._choice(i, self._echo(i) + choice.text, choice.logprobs, answers.finish(choice.finish_reason))
            for i, choice in collected.good()
        ]
        return {**self._head(), "choices": choices, "usage": answers.usage(spent)}

    def parts(self, chunk: Chunk) -> list[Completion]:
        self._progress.add(chunk)
        if not self._started and self._progress.has_failed:
            return []  # nothing was said, not even an echo: it can still be an error answer
        said = [] if self._started else [self._chunk(self._choice(i, self._echo(i))) for i in range(self.choices) if self._echo(i)]
        self._started = True
        said += [self._chunk(self._from(delta)) for delta in chunk.deltas if delta.text or delta.logprobs or answers.ends(delta)]
        return said

    def usage(self) -> Usage:
        """Raises ReplicaLost when the streamed answer isn't whole."""
        return self._progress.usage()

    @property
    def failure(self) -> ModelError | None:
        """What a streamed answer ends with when the model failed on a choice."""
        return self._progress.failure

    def end(self) -> list[Completion]:
        """The usage chunk, for a caller that asked."""
        if not self.request.wants_usage:
            return []
        return [{**self._head(), "choices": [], "usage": answers.usage(self.usage())}]

    def _echo(self, index: int) -> str:
        return str(self._prompts[index // self.request.choices]) if self.request.echo else ""

    def _from(self, delta: Delta) -> TextChoice:
        return self._choice(delta.index, delta.text, delta.logprobs, answers.finish(delta.finish_reason))

    def _choice(self, index: int, text: str, tokens: Sequence[TokenLogprob] = (), finish: Finish | None = None) -> TextChoice:
        return {"index": index, "text": text, "logprobs": self._logprobs(index, tokens), "finish_reason": finish}

    def _chunk(self, choice: TextChoice) -> Completion:
        chunk = self._head()
        chunk["choices"] = [choice]
        if self.request.wants_usage:
            chunk["usage"] = None
        return chunk

    def _head(self) -> Completion:
        head: Completion = {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self.model,
            "choices": [],
        }
        if tier := self.request.tier_given:
            head["service_tier"] = tier
        return head

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> TextLogprobs | None:
        if self.request.logprobs is None:
            return None
        return {
            "tokens": [token.token for token in tokens],
            "token_logprobs": [answers.finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {token.token: answers.finite(token.logprob)} | {top.token: answers.finite(top.logprob) for top in token.top}
                for token in tokens
            ],
            "text_offset": [self._offsets[index].of(token) for token in tokens],
        }


class _Offsets:
    """Where each token starts in a choice's text, in characters; a token may hold a part of one."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def of(self, token: TokenLogprob) -> int:
        start = self._length
        self._length += len(self._decoder.decode(token.bytes))
        return start
