"""POST /v1/chat/completions: a conversation in, an answer or its chunks out. Pure translation; the models are called elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from cluster.errors import ModelError
from cluster.types import Chunk, Delta, Generate, Message, TokenLogprob, ToolChoice, Usage
from deployments.gateway.openai import answers, unsupported
from deployments.gateway.openai.answers import AssistantMessage, ChatChunk, ChatCompletion, ChatDelta, ChatLogprobs, Finish
from deployments.gateway.openai.progress import Choice, Collected, Progress
from deployments.gateway.openai.types import ChatMessage, ChatRequest, parse


class ChatCall:
    """One request: what to ask of the model, and how to say what comes back."""

    prefix: Literal["chatcmpl-"] = "chatcmpl-"

    def __init__(self, body: dict[str, Any], *, request_id: str, answer_id: str, tenant: str, created: int) -> None:
        """Raises InvalidRequest."""
        unsupported.refuse(body, unsupported.CHAT)
        self.request = request = parse(ChatRequest, body)
        request.check()
        self.model = request.model
        self.streams = bool(request.stream)
        self.choices = request.choices
        self.calls = (self._generate(request, request_id, tenant),)
        self._id, self._created = answer_id, created
        self._progress = Progress(self.choices)
        self._started = False

    @staticmethod
    def _generate(request: ChatRequest, request_id: str, tenant: str) -> Generate:
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        return Generate(
            request_id=request_id,
            tenant=tenant,
            messages=_turns(request.messages),
            sampling=request.sampling(max_tokens=max_tokens, logprobs=logprobs),
            open=request.left_open,
            priority=request.priority,
            tools=tuple(tool.asked for tool in request.tools or ()),
            tool_choice=_choice(request),
        )

    def whole(self, collected: Collected) -> ChatCompletion:
        spent = collected.usage()
        answer: ChatCompletion = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self.model,
            "choices": [
                {
                    "index": index,
                    "message": _message(choice),
                    "logprobs": self._logprobs(choice.logprobs),
                    "finish_reason": answers.finish(choice.finish_reason) or "stop",
                }
                for index, choice in collected.good()
            ],
            "usage": answers.usage(spent),
        }
        if tier := self.request.tier_given:
            answer["service_tier"] = tier
        return answer

    def parts(self, chunk: Chunk) -> list[ChatChunk]:
        """The chunks that say this; the first call opens every choice in index order, which the official client needs."""
        self._progress.add(chunk)
        if not self._started and self._progress.has_failed:
            return []  # nothing was said: it can still be an error answer
        content = None if self.request.may_call else ""  # an answer of calls alone has no text, not an empty one
        said = [] if self._started else [self._chunk(i, {"role": "assistant", "content": content}) for i in range(self.choices)]
        self._started = True
        for delta in chunk.deltas:
            said += self._say(delta)
        return said

    def usage(self) -> Usage:
        """Raises ReplicaLost when the streamed answer isn't whole."""
        return self._progress.usage()

    @property
    def failure(self) -> ModelError | None:
        """What a streamed answer ends with when the model failed on a choice."""
        return self._progress.failure

    def end(self) -> list[ChatChunk]:
        """The usage chunk, for a caller that asked."""
        if not self.request.wants_usage:
            return []
        return [{**self._head(), "choices": [], "usage": answers.usage(self.usage())}]

    def _say(self, delta: Delta) -> list[ChatChunk]:
        said = []
        if delta.text or delta.logprobs:
            said.append(self._chunk(delta.index, {"content": delta.text}, logprobs=self._logprobs(delta.logprobs)))
        if calls := [answers.tool_call_delta(news) for news in delta.tool_calls if not news.broken]:
            said.append(self._chunk(delta.index, {"tool_calls": calls}))
        if answers.ends(delta):
            said.append(self._chunk(delta.index, {}, finish=answers.finish(delta.finish_reason)))
        return said

    def _chunk(
        self, index: int, delta: ChatDelta, *, logprobs: ChatLogprobs | None = None, finish: Finish | None = None
    ) -> ChatChunk:
        chunk = self._head()
        chunk["choices"] = [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]
        if self.request.wants_usage:
            chunk["usage"] = None
        return chunk

    def _head(self) -> ChatChunk:
        head: ChatChunk = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self.model,
            "choices": [],
        }
        if tier := self.request.tier_given:
            head["service_tier"] = tier
        return head

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if not self.request.logprobs:
            return None
        content = [
            answers.ChatToken(**answers.top_token(token), top_logprobs=[answers.top_token(top) for top in token.top])
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _message(choice: Choice) -> AssistantMessage:
    calls = [answers.tool_call(call) for call in choice.tool_calls]
    message: AssistantMessage = {"role": "assistant", "content": choice.text or (None if calls else ""), "refusal": None}
    if calls:
        message["tool_calls"] = calls
    return message


def _turns(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """The chat as templates expect it: `developer` is the API's newer word for `system`, and a result names its function."""
    names: dict[str, str] = {}
    turns = []
    for message in messages:
        calls = tuple(call.made for call in message.tool_calls or ())
        names |= {call.id: call.name for call in calls}
        role = "system" if message.role == "developer" else message.role
        name = message.name or names.get(message.tool_call_id or "")
        turns.append(Message(role, message.text, name, calls, message.tool_call_id))
    return tuple(turns)


def _choice(request: ChatRequest) -> ToolChoice:
    parallel = request.parallel_tool_calls is not False
    return ToolChoice(parallel=parallel) if request.tool_choice is None else request.tool_choice.asked(parallel)
