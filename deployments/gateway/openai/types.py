"""Requests of the OpenAI API as strict, bounded types (API reference of 2026, with the sampling fields that vLLM added).

Nothing is coerced: `"1"` is no number, `true` is no integer, NaN is nothing. Unknown fields are ignored; those that would change
the answer are refused before, by `unsupported.py`. Every list and string has a bound, the body as a whole has another.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field, StringConstraints, WithJsonSchema
from pydantic_core import PydanticCustomError

from cluster.errors import InvalidRequest
from cluster.types import Constraint, Priority, Sampling
from deployments.gateway import errors
from deployments.gateway.openai import forms
from deployments.gateway.openai.bounded import Bounded
from deployments.gateway.openai.forms import ResponseFormat, StructuredOutputs
from deployments.gateway.openai.tools import MAX_TOOLS, Call, CallId, Tool, ToolChoice, check_arguments, check_choice

MAX_N = 16
MAX_PROMPTS = 128
MAX_TOKENS = 1 << 24
MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "repetition_penalty")

Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Stops = Annotated[
    list[str],
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 4}]}),
]
"""One stop string or up to four; always a list once it is read."""


Request = TypeVar("Request", bound=Bounded)


class StreamOptions(Bounded):
    include_usage: bool | None = None


class Sampled(Bounded):
    """What chat and text completions have in common."""

    model: str = Field(min_length=1, max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_N)
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    min_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: Probability | None = None
    top_k: int | None = Field(default=None, ge=-1, le=1 << 31)
    min_p: Probability | None = None
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: Stops | None = None
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=128)
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = Field(default=None, description="vLLM's older name for structured_outputs.json.")
    guided_regex: str | None = Field(default=None, description="For structured_outputs.regex.")
    guided_choice: list[str] | None = Field(default=None, description="For structured_outputs.choice.")
    guided_grammar: str | None = Field(default=None, description="For structured_outputs.grammar.")
    service_tier: Literal["auto", "default", "flex"] | None = None
    """`flex` is the class of service that yields to others. None is above the usual one, so that `priority` is refused."""
    logit_bias: dict[Annotated[str, StringConstraints(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        Field(default=None, max_length=1024)
    )

    @pydantic.field_validator("stop", mode="before")
    @classmethod
    def _stop(cls, value: object) -> object:
        texts = [value] if isinstance(value, str) else value
        if texts is not None and not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            raise PydanticCustomError("invalid_type", "Input should be a string or a list of strings")
        if texts is not None and not (len(texts) <= 4 and all(0 < len(text) <= 1024 for text in texts)):
            raise PydanticCustomError("invalid_value", "At most 4 stop strings of 1 to 1024 characters are accepted")
        return texts

    @property
    def left_open(self) -> frozenset[str]:
        """What the caller leaves to the model's own defaults."""
        return frozenset(name for name in MODEL_DEFAULTS if getattr(self, name) is None)

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def tier_given(self) -> Literal["default", "flex"] | None:
        """What the answer says of its class of service: nothing, unless the caller named one."""
        return "default" if self.service_tier == "auto" else self.service_tier

    @property
    def priority(self) -> Priority:
        return "batch" if self.service_tier == "flex" else "interactive"

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """What holds between fields. Raises InvalidRequest."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed when stream is true.", param="stream_options")

    def sampling(self, *, max_tokens: int | None, logprobs: int | None) -> Sampling:
        if max_tokens is not None and (self.min_tokens or 0) > max_tokens:
            raise InvalidRequest(f"min_tokens is {self.min_tokens}, more than max_tokens, {max_tokens}.", param="min_tokens")
        default = Sampling()
        return Sampling(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=_or(self.temperature, default.temperature),
            top_k=max(self.top_k or 0, 0),
            top_p=_or(self.top_p, default.top_p),
            min_p=self.min_p or 0.0,
            repetition_penalty=_or(self.repetition_penalty, default.repetition_penalty),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=self.seed,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            logprobs=logprobs,
            n=self.choices,
            constraint=self._constraint(),
        )

    def _constraint(self) -> Constraint | None:
        older = {name: value for name in forms.KINDS if (value := getattr(self, f"guided_{name}", None)) is not None}
        return forms.constraint(self.response_format, self.structured_outputs, older)


class TextPart(Bounded):
    type: Literal["text"]
    text: str


Parts = Annotated[
    list[TextPart],
    Field(min_length=1, max_length=1024),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": TextPart.model_json_schema(), "minItems": 1}]}),
]
"""What a message says: a string in the document and on the wire, or text parts; always parts once it is read."""


class ChatMessage(Bounded):
    """One turn. Text, an assistant's calls of tools, or the result of one."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Parts | None = None
    refusal: str | None = None
    name: str | None = Field(default=None, max_length=256)
    tool_calls: list[Call] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_call_id: CallId | None = None
    function_call: None = None
    audio: None = None

    @pydantic.field_validator("content", mode="before")
    @classmethod
    def _content(cls, value: object) -> object:
        if value is not None and not isinstance(value, (str, list)):
            raise PydanticCustomError("invalid_type", "Input should be a string or a list of text parts")
        return [{"type": "text", "text": value}] if isinstance(value, str) else value

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content) if self.content is not None else self.refusal or ""


class ChatRequest(Sampled):
    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS, description="Deprecated for max_completion_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def may_call(self) -> bool:
        """Whether an answer may hold calls."""
        return bool(self.tools) and not (self.tool_choice is not None and self.tool_choice.type == "none")

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
        check_choice(self.tools or (), self.tool_choice)
        for index, message in enumerate(self.messages):
            _check_content(message, f"messages[{index}]")
        _check_turns(self.messages)


def _check_content(message: ChatMessage, where: str) -> None:
    """What a turn of its role must and mustn't have. Raises InvalidRequest."""
    speaks_otherwise = message.role == "assistant" and (message.refusal or message.tool_calls)
    missing = "content" if message.content is None and not speaks_otherwise else None
    if message.role == "tool" and message.tool_call_id is None:
        missing = "tool_call_id"
    if missing:
        param = f"{where}.{missing}"
        raise InvalidRequest(f"Missing required parameter: {param}.", param=param, code="missing_required_parameter")
    for field, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
        if getattr(message, field) and message.role != role:
            raise InvalidRequest(f"{field} is only allowed in messages of role {role!r}.", param=f"{where}.{field}")
    for number, call in enumerate(message.tool_calls or ()):
        check_arguments(call, f"{where}.tool_calls[{number}]")


def _check_turns(messages: list[ChatMessage]) -> None:
    """Calls are answered by the messages that follow them, each once. Raises InvalidRequest."""
    called_at, unanswered = 0, set[str]()
    for index, message in enumerate(messages):
        if message.role == "tool":
            if message.tool_call_id not in unanswered:
                raise InvalidRequest(
                    "A message of role 'tool' must answer a call of the assistant's message before it, and each call once.",
                    param=f"messages[{index}].tool_call_id",
                )
            unanswered.remove(message.tool_call_id)
            continue
        _check_answered(unanswered, called_at)
        called_at, calls = index, message.tool_calls or []
        unanswered = {call.id for call in calls}
        if len(unanswered) < len(calls):
            raise InvalidRequest("Two calls of one message have the same id.", param=f"messages[{index}].tool_calls")
    _check_answered(unanswered, called_at)


def _check_answered(unanswered: set[str], called_at: int) -> None:
    if unanswered:
        ids = ", ".join(sorted(unanswered))[:256]
        raise InvalidRequest(
            f"Every call must be answered by a message of role 'tool' after it. Without an answer: {ids}.",
            param=f"messages[{called_at}].tool_calls",
        )


class CompletionRequest(Sampled):
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS, description="16 when absent.")
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=5)
    best_of: int | None = Field(default=None, ge=1, le=MAX_N)

    @pydantic.field_validator("prompt", mode="before")
    @classmethod
    def _prompt(cls, value: object) -> object:
        prompts = value if isinstance(value, list) and value and not _is_ids(value) else [value]
        if len(prompts) > MAX_PROMPTS:
            raise PydanticCustomError("invalid_value", "At most {most} prompts are accepted", {"most": MAX_PROMPTS})
        if not (all(isinstance(prompt, str) for prompt in prompts) or all(_is_ids(prompt) for prompt in prompts)):
            raise PydanticCustomError(
                "invalid_type", "Input should be a string, a list of strings, a list of token ids or a list of such lists"
            )
        return value

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry for each call."""
        many: Any = self.prompt if isinstance(self.prompt, list) and not _is_ids(self.prompt) else [self.prompt]
        return list(many)

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != self.choices:
            raise InvalidRequest("best_of is only accepted when it equals n.", param="best_of", code="unsupported_parameter")
        if self.echo and self.logprobs is not None:
            raise InvalidRequest("echo together with logprobs is not supported.", param="echo", code="unsupported_parameter")
        if self.echo and not isinstance(self.prompts[0], str):
            raise InvalidRequest("echo needs a prompt of text, not of token ids.", param="echo", code="unsupported_parameter")


def parse(kind: type[Request], body: dict[str, Any]) -> Request:
    """Raises InvalidRequest with the offending field as `param`."""
    try:
        return kind.model_validate(body)
    except pydantic.ValidationError as error:
        raise errors.from_validation(error) from None


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and 0 <= item < 1 << 31 for item in value)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
