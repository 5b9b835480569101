"""POST /v1/embeddings, /v1/rerank and /v1/classify: what is asked of an encoder, and how to say what comes back.

Embeddings are OpenAI's; reranking has the shape that Cohere and Jina share, classification vLLM's. Does no I/O.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from cluster.errors import InvalidRequest
from cluster.types import Encode, Encoded
from deployments.gateway.openai.bounded import Bounded
from deployments.gateway.openai.types import TokenId, _is_ids, parse

MAX_INPUTS = 2048
MAX_TEXT = 1 << 22

Body = Mapping[str, object]


class _Request(Bounded):
    model: str = Field(min_length=1, max_length=256)
    user: str | None = Field(default=None, max_length=1024)
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, le=1 << 24)
    """Keep at most so many tokens of an input; -1: as many as the model takes. Longer inputs are refused without it."""


class EmbeddingRequest(_Request):
    input: str | list[str] | list[TokenId] | list[list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1, le=1 << 20)
    prompt_name: str | None = Field(default=None, min_length=1, max_length=256)
    """One of the prompts that the model has in its config_sentence_transformers.json, put before each text."""

    @pydantic.field_validator("input", mode="before")
    @classmethod
    def _input(cls, value: object) -> object:
        inputs = _listed(value, MAX_INPUTS)
        if not (all(isinstance(item, str) for item in inputs) or all(_is_ids(item) for item in inputs)):
            raise PydanticCustomError(
                "invalid_type", "Input should be a string, a list of strings, a list of token ids or a list of such lists"
            )
        if not all(inputs):
            raise PydanticCustomError("invalid_value", "Input must not be empty")
        return value

    @property
    def inputs(self) -> list[Any]:
        many: Any = self.input if isinstance(self.input, list) and not _is_ids(self.input) else [self.input]
        return list(many)


class ClassifyRequest(_Request):
    input: str | list[str]

    @pydantic.field_validator("input", mode="before")
    @classmethod
    def _input(cls, value: object) -> object:
        return _texts(_listed(value, MAX_INPUTS)) and value

    @property
    def inputs(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class Document(Bounded):
    text: str = Field(min_length=1)


class RerankRequest(_Request):
    query: str = Field(min_length=1)
    documents: list[str | Document] = Field(min_length=1, max_length=MAX_INPUTS - 1)
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool | None = None

    @property
    def texts(self) -> list[str]:
        return [document if isinstance(document, str) else document.text for document in self.documents]


class InputUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class Embedding(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(TypedDict):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: InputUsage


class RankedText(TypedDict):
    text: str


class Ranked(TypedDict, total=False):
    index: int
    relevance_score: float
    document: RankedText


class Ranking(TypedDict):
    id: str
    model: str
    results: list[Ranked]
    usage: InputUsage


class Class(TypedDict):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classification(TypedDict):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Class]
    usage: InputUsage


class EmbeddingCall:
    """One request: what to ask of the model, and how to say what comes back."""

    prefix: ClassVar[str] = "embd-"

    def __init__(self, body: dict[str, Any], *, request_id: str, answer_id: str, tenant: str, created: int) -> None:
        """Raises InvalidRequest."""
        self._request = request = parse(EmbeddingRequest, body)
        self.model = request.model
        inputs = request.inputs
        given: dict[str, Any] = {"texts": tuple(inputs)} if isinstance(inputs[0], str) else {"ids": tuple(map(tuple, inputs))}
        if "ids" in given and request.prompt_name is not None:
            raise InvalidRequest("prompt_name goes with texts, not with token ids.", param="prompt_name")
        self.asked = Encode(
            request_id,
            tenant,
            "embed",
            **given,
            prompt_name=request.prompt_name,
            cut=_cut(request),
            dimensions=request.dimensions,
        )

    def answer(self, encoded: Encoded) -> EmbeddingList:
        size = 4 * encoded.width
        places = range(0, len(encoded.numbers), size)
        vectors: list[Any]
        if self._request.encoding_format == "base64":
            vectors = [base64.b64encode(encoded.numbers[place : place + size]).decode() for place in places]
        else:
            vectors = _rows(encoded)
        data: list[Embedding] = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
        return {"object": "list", "data": data, "model": self.model, "usage": _usage(encoded)}


class RerankCall:
    """One request: what to ask of the model, and how to say what comes back."""

    prefix: ClassVar[str] = "rerank-"

    def __init__(self, body: dict[str, Any], *, request_id: str, answer_id: str, tenant: str, created: int) -> None:
        """Raises InvalidRequest."""
        self._request = request = parse(RerankRequest, body)
        self.model, self._id, self._texts = request.model, answer_id, request.texts
        _texts(self._texts, "documents")
        self.asked = Encode(request_id, tenant, "rerank", texts=tuple(self._texts), query=request.query, cut=_cut(request))

    def answer(self, encoded: Encoded) -> Ranking:
        scores = [score for (score,) in _rows(encoded)]
        best = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[: self._request.top_n]
        return {
            "id": self._id,
            "model": self.model,
            "results": [self._ranked(i, scores[i]) for i in best],
            "usage": _usage(encoded),
        }

    def _ranked(self, index: int, score: float) -> Ranked:
        ranked: Ranked = {"index": index, "relevance_score": score}
        if self._request.return_documents:
            ranked["document"] = {"text": self._texts[index]}
        return ranked


class ClassifyCall:
    """One request: what to ask of the model, and how to say what comes back."""

    prefix: ClassVar[str] = "classify-"

    def __init__(self, body: dict[str, Any], *, request_id: str, answer_id: str, tenant: str, created: int) -> None:
        """Raises InvalidRequest."""
        request = parse(ClassifyRequest, body)
        self.model, self._id, self._created = request.model, answer_id, created
        self.asked = Encode(request_id, tenant, "classify", texts=tuple(request.inputs), cut=_cut(request))

    def answer(self, encoded: Encoded) -> Classification:
        data: list[Class] = [
            {"index": i, "label": encoded.labels[probs.index(max(probs))], "probs": probs, "num_classes": encoded.width}
            for i, probs in enumerate(_rows(encoded))
        ]
        return {
            "id": self._id,
            "object": "list",
            "created": self._created,
            "model": self.model,
            "data": data,
            "usage": _usage(encoded),
        }


def _rows(encoded: Encoded) -> list[list[float]]:
    """The numbers of each input. The wire's byte order is that of every machine that we run on."""
    numbers: list[Any] = memoryview(encoded.numbers).cast("f").tolist()
    return [numbers[place : place + encoded.width] for place in range(0, len(numbers), encoded.width)]


def _usage(encoded: Encoded) -> InputUsage:
    return {"prompt_tokens": encoded.usage.prompt_tokens, "total_tokens": encoded.usage.prompt_tokens}


def _cut(request: _Request) -> int | None:
    if request.truncate_prompt_tokens == 0:
        raise InvalidRequest("truncate_prompt_tokens must be -1 or positive.", param="truncate_prompt_tokens")
    return request.truncate_prompt_tokens


def _listed(value: object, most: int) -> list[Any]:
    """One entry for each input."""
    inputs = value if isinstance(value, list) and not _is_ids(value) else [value]
    if not inputs:
        raise PydanticCustomError("invalid_value", "Input must not be empty")
    if len(inputs) > most:
        raise PydanticCustomError("invalid_value", "At most {most} inputs are accepted", {"most": most})
    return inputs


def _texts(inputs: list[Any], param: str | None = None) -> bool:
    """Raises for what is no text, and for an empty one."""
    if not all(isinstance(item, str) for item in inputs):
        raise PydanticCustomError("invalid_type", "Input should be a string or a list of strings")
    if not all(inputs):
        if param is not None:
            raise InvalidRequest(f"{param} must not hold an empty text.", param=param)
        raise PydanticCustomError("invalid_value", "Input must not be empty")
    return True
