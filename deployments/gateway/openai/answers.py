"""Answers of the OpenAI API as typed dictionaries: what mypy checks, what the OpenAPI document shows, what goes out as JSON."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from cluster import types
from cluster.types import TokenLogprob, TopLogprob

Finish = Literal["stop", "length", "tool_calls"]
Tier = Literal["default", "flex"]

LEAST_LOGPROB = -9999.0
"""The API's own word for minus infinity, which JSON can't say."""


class ErrorBody(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(TypedDict):
    error: ErrorBody


class PromptDetails(TypedDict):
    cached_tokens: int
    audio_tokens: int


class OutputDetails(TypedDict):
    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: OutputDetails


class TopToken(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(TopToken):
    top_logprobs: list[TopToken]


class ChatLogprobs(TypedDict):
    content: list[ChatToken]
    refusal: None


class CalledFunction(TypedDict):
    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    service_tier: NotRequired[Tier]
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    service_tier: NotRequired[Tier]
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish | None


class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    service_tier: NotRequired[Tier]
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: NotRequired[str]  # of an adapter: its base


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


def usage(spent: types.Usage) -> Usage:
    return {
        "prompt_tokens": spent.prompt_tokens,
        "completion_tokens": spent.completion_tokens,
        "total_tokens": spent.total_tokens,
        "prompt_tokens_details": {"cached_tokens": spent.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def ends(delta: types.Delta) -> bool:
    """Whether the choice ends here with a reason that the API has a word for. `error` is said by an error."""
    return delta.finish_reason not in (None, "error")


def finish(reason: types.FinishReason | None) -> Finish | None:
    """`abort` never gets here: `Progress` raises on it. The API has no word for `error`."""
    assert reason != "abort"
    return None if reason == "error" else reason


def tool_call(call: types.ToolCall) -> ToolCall:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def tool_call_delta(news: types.ToolCallDelta) -> ToolCallDelta:
    """The first of a call says which it is, the others only what is new."""
    if news.id is None or news.name is None:
        return {"index": news.index, "function": {"arguments": news.arguments}}
    function: FunctionDelta = {"name": news.name, "arguments": news.arguments}
    return {"index": news.index, "id": news.id, "type": "function", "function": function}


def top_token(token: TokenLogprob | TopLogprob) -> TopToken:
    return {"token": token.token, "logprob": finite(token.logprob), "bytes": list(token.bytes)}


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


class AuditLog(TypedDict):
    """One act or denial; its details stand under the name of its type."""

    id: str
    type: str
    effective_at: int
    actor: dict[str, object]
    project: NotRequired[dict[str, str]]


class AuditLogs(TypedDict):
    object: Literal["list"]
    data: list[AuditLog]
    first_id: str | None
    last_id: str | None
    has_more: bool
