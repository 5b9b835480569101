"""Answers as typed objects, in the official API's shape. Fields that a later server adds are ignored."""

from __future__ import annotations

from msgspec import Struct


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopToken(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class Token(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopToken] = []


class Logprobs(Struct, frozen=True):
    content: list[Token]


class Function(Struct, frozen=True):
    """What to call. In a stream the name comes once, and the arguments in parts."""

    name: str | None = None
    arguments: str = ""


class ToolCall(Struct, frozen=True):
    id: str
    function: Function
    type: str = "function"


class ToolCallDelta(Struct, frozen=True):
    index: int
    function: Function
    id: str | None = None
    type: str | None = None


class Message(Struct, frozen=True):
    role: str
    content: str | None = None
    tool_calls: list[ToolCall] | None = None


class Choice(Struct, frozen=True):
    index: int
    message: Message
    finish_reason: str
    logprobs: Logprobs | None = None


class ChatCompletion(Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(Struct, frozen=True):
    role: str | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(Struct, frozen=True):
    index: int
    delta: Delta
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


class ChatCompletionChunk(Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class TextLogprobs(Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Struct, frozen=True):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: TextLogprobs | None = None


class Completion(Struct, frozen=True):
    """A whole answer, or one chunk of a streamed one."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class Model(Struct, frozen=True):
    id: str
    created: int
    owned_by: str


class InputUsage(Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class Embedding(Struct, frozen=True):
    index: int
    embedding: list[float]


class Embeddings(Struct, frozen=True):
    model: str
    data: list[Embedding]
    usage: InputUsage


class RankedText(Struct, frozen=True):
    text: str


class Ranked(Struct, frozen=True):
    index: int
    relevance_score: float
    document: RankedText | None = None


class Ranking(Struct, frozen=True):
    id: str
    model: str
    results: list[Ranked]
    usage: InputUsage


class Class(Struct, frozen=True):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classification(Struct, frozen=True):
    id: str
    model: str
    data: list[Class]
    usage: InputUsage
