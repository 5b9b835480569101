"""The vocabulary: frozen messages that cross processes. Nothing here does any work.

A call enters as `Generate`, travels to one replica and comes back as a stream of `Chunk`s. Everything is plain data, so that it
can be pickled to a Ray actor, compared in a test and read in a log.
"""

from __future__ import annotations

import builtins
import re
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]
Priority = Literal["interactive", "batch"]
"""Classes of service: `batch` yields to `interactive`, and gets a small share of a busy model."""

Quantization = Literal["int8", "fp8"]
"""Weights, and what they are multiplied with, in eight bits: integers, or floating-point numbers (e4m3)."""

NAME = re.compile(r"^[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?\Z")
"""Names of models and deployments: lower case, digits, `.`, `_` and `-`, at most 63 characters, never a path."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling. All of it comes from the key alone, never from a request.

    `tenant` is a project's id, empty for an admin key: what everything is isolated by. `models`: the only ones that the key may
    call; none says every one.
    """

    tenant: str
    key_id: str
    scopes: frozenset[str]
    organization: str = ""
    models: frozenset[str] | None = None

    def can(self, scope: str) -> bool:
        return scope in self.scopes

    def may_call(self, model: str) -> bool:
        return self.models is None or model in self.models


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A registered model: `models:/NAME/VERSION` or `models:/NAME@ALIAS` (MLflow's own notation)."""

    name: str
    version: int | None = None
    alias: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """Raises ValueError for anything but the two forms."""
        match = re.fullmatch(r"models:/([^/@]+)(?:/(\d{1,9})|@([a-z0-9_-]{1,64}))", text)
        if match is None or NAME.match(match[1]) is None:
            raise ValueError(f"{text!r} is not a model reference; write models:/NAME/VERSION or models:/NAME@ALIAS")
        return cls(match[1], int(match[2]) if match[2] else None, match[3])

    def __str__(self) -> str:
        return f"models:/{self.name}/{self.version}" if self.version is not None else f"models:/{self.name}@{self.alias}"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What form an answer must have. `text` is a JSON schema, a regular expression or a grammar in Lark's notation as llguidance
    reads it; none for `json_object`."""

    kind: Literal["json_object", "json_schema", "regex", "grammar"]
    text: str = ""
    param: str = field(default="response_format", compare=False)  # the request's field that says so, for errors


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Defaults are those of the OpenAI API, except that `max_tokens=None` means up to the context window."""

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None  # None: none; k: the chosen token's and the k most likely ones'
    n: int = 1
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may ask its caller to run. `parameters` is the JSON schema of its arguments, an object's, as text;
    `strict`: a call's arguments must satisfy it."""

    name: str
    description: str | None = None
    parameters: str = '{"type": "object", "properties": {}}'
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether a model may, must or must not call, which functions (none named: any), and whether several at once."""

    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] = ()
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What a model asked for. `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat. An assistant's may carry calls; a tool's answers the call `tool_call_id`."""

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter as callers name it, `BASE:NAME`, with the address of its files in the library (a row of the store)."""

    base: str  # a deployment's name
    name: str
    address: str  # sha256 of the files' manifest, in hex
    created_at: float = 0.0  # seconds since the epoch

    @property
    def model(self) -> str:
        return f"{self.base}:{self.name}"


@dataclass(frozen=True, slots=True)
class Generate:
    """One call to a language model: either `messages` (rendered by the model's chat template), `prompt` text or `prompt_ids`."""

    request_id: str
    tenant: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    open: frozenset[str] = frozenset()  # fields of `sampling` that the caller left to the model's own defaults
    priority: Priority = "interactive"
    adapter: Adapter | None = None  # found by the gateway, never given by the caller
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """A token that could have been chosen. `bytes` keeps what text can't hold: a token may be half of a character."""

    token: str
    bytes: builtins.bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The chosen token with the most likely ones at its place, best first."""

    token: str
    bytes: builtins.bytes
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """News of the call `index` of a choice: the first of a call has its `id` and `name`, and every one may add `arguments`.
    `broken`: it turned out to be malformed, what was said of it is void, and it stands in the text instead."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    broken: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one of the `n` choices: text since the last delta (may be empty), and the finish reason with the last one."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call: the prompt once, the output over all choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    from_cache: bool = False  # the gateway had the whole answer: no model worked for it
    compute_us: int = 0  # microseconds of the model's steps, as far as they were for this call

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """One item of an answer's stream. The first comes as soon as the first token, and says in `begun` what the prompt takes; the
    last carries `usage`. `compute_us` is the compute since the chunk before, so that it is known of an answer that breaks off."""

    deltas: tuple[Delta, ...]
    usage: Usage | None = None
    begun: Usage | None = None
    compute_us: int = 0


@dataclass(frozen=True, slots=True)
class Encode:
    """One call to an encoder: `texts`, or `ids` that are its own tokens. With `query` it asks how well each text answers that."""

    request_id: str
    tenant: str
    task: Literal["embed", "rerank", "classify"]
    texts: tuple[str, ...] = ()
    ids: tuple[tuple[int, ...], ...] = ()
    query: str | None = None
    prompt_name: str | None = None
    cut: int | None = None  # keep at most so many tokens of each; -1: as many as the model takes; None: refuse longer ones
    dimensions: int | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """`width` numbers for each input: an embedding, one score, or the probabilities of the `labels`. `numbers` are float32,
    little-endian, one input behind the other."""

    numbers: bytes
    width: int
    usage: Usage
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a model takes or gives, in the words of the Open Inference Protocol; -1 in its shape is any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """Values with a shape. `data` has them row by row, little-endian; of BYTES each stands behind its length (32 bits)."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class Predict:
    """One call to a model of tensors. No `outputs`: all of them; no `version`: the one that is served."""

    request_id: str
    tenant: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...] = ()
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Predicted:
    """The answer: tensors, in the order in which they were asked for, for so many `rows`. There are no tokens."""

    outputs: tuple[Tensor, ...]
    rows: int
    version: str
    usage: Usage = Usage(0, 0)


@dataclass(frozen=True, slots=True)
class Deployment:
    """Desired state of one served model (a row of the store)."""

    name: str
    model: str  # models:/NAME@ALIAS, or a directory that `mmaas up --model` was given
    tp: int = 1
    dtype: str = "float32"
    min_replicas: int = 1
    max_replicas: int = 1
    max_model_len: int | None = None
    created_at: float = 0.0  # seconds since the epoch
    pp: int = 1  # stages of `tp` shards each
    quantization: Quantization | None = None
