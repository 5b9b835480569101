"""The platform from Python, with the calls of the official OpenAI client: over HTTP, or over a Ray handle from another job.

    from mmaas.client import connect

    client = connect(base_url="http://127.0.0.1:8000", api_key="mk_…")   # anywhere
    client = connect(api_key="mk_…")                                     # in a Ray job on the cluster
    for chunk in client.chat.completions.create(model="chat", messages=[…], stream=True):
        print(chunk.choices[0].delta.content or "", end="")

Both ways give the same objects, the same errors (`cluster.errors`) and pass the same checks.
"""

from __future__ import annotations

import base64
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal, TypeVar, overload

import msgspec

from cluster.errors import InvalidRequest, Unavailable
from mmaas.answers import (
    ChatCompletion,
    ChatCompletionChunk,
    Classification,
    Completion,
    Embedding,
    Embeddings,
    InputUsage,
    Model,
    Ranking,
)
from mmaas.transport import Answers, HandleTransport, HttpTransport, Transport

Answer = TypeVar("Answer")
Messages = Sequence[Mapping[str, Any]]

TIMEOUT_S = 600.0


def connect(handle: Any = None, *, base_url: str | None = None, api_key: str | None = None, timeout_s: float = TIMEOUT_S) -> Client:
    """A client over `handle` (the gateway's DeploymentHandle), over HTTP to `base_url`, or over the cluster of this Ray job.

    `api_key` is read from MMAAS_API_KEY when not given; `timeout_s` is the longest silence over HTTP. Raises InvalidRequest
    without a key and Unavailable where there is no way to a gateway.
    """
    api_key = api_key or os.environ.get("MMAAS_API_KEY")
    if not api_key:
        raise InvalidRequest("connect() needs api_key, or MMAAS_API_KEY in the environment", param="api_key")
    if base_url is not None:
        return Client(HttpTransport(base_url, api_key, timeout_s))
    return Client(HandleTransport(handle if handle is not None else _gateway_handle(), api_key))


def _gateway_handle() -> Any:
    """The gateway of the cluster that this process is, or can be, connected to."""
    import ray

    if not ray.is_initialized():
        if "RAY_ADDRESS" not in os.environ:
            raise Unavailable("this process is not on a Ray cluster: pass base_url, or run it with `ray job submit`")
        ray.init(log_to_driver=False)
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return serve.get_deployment_handle("Gateway", app_name="gateway")
    except RayServeException as error:
        raise Unavailable("this Ray cluster runs no gateway: start it with `mmaas up`") from error


class Client:
    """`chat.completions`, `completions`, `embeddings` and `models`, as in the official client; `rerank` and `classify`, which it
    lacks. A context manager."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.chat = Chat(transport)
        self.completions = Completions(transport)
        self.embeddings = EmbeddingVectors(transport)
        self.models = Models(transport)

    def rerank(self, *, model: str, query: str, documents: Sequence[str], **options: Any) -> Ranking:
        """Documents by how well they answer the query, the best first. `options`: top_n, return_documents… Raises PlatformError."""
        body = {"model": model, "query": query, "documents": list(documents), **options}
        return _one(self._transport.send("rerank", body), Ranking)

    def classify(self, *, model: str, input: str | Sequence[str], **options: Any) -> Classification:
        """The likeliest label of each text, and the probabilities of all. Raises PlatformError."""
        body = {"model": model, "input": input if isinstance(input, str) else list(input), **options}
        return _one(self._transport.send("classify", body), Classification)

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Chat:
    def __init__(self, transport: Transport) -> None:
        self.completions = ChatCompletions(transport)


class ChatCompletions:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @overload
    def create(self, *, model: str, messages: Messages, stream: Literal[False] = ..., **options: Any) -> ChatCompletion: ...
    @overload
    def create(self, *, model: str, messages: Messages, stream: Literal[True], **options: Any) -> Iterator[ChatCompletionChunk]: ...
    def create(
        self, *, model: str, messages: Messages, stream: bool = False, **options: Any
    ) -> ChatCompletion | Iterator[ChatCompletionChunk]:
        """Answer a conversation. `options` are the API's: temperature, max_tokens, n, stop, seed… Raises PlatformError."""
        body = {"model": model, "messages": [dict(message) for message in messages], "stream": stream, **options}
        answers = self._transport.send("chat.completions", body)
        return _stream(answers, ChatCompletionChunk) if stream else _one(answers, ChatCompletion)


class Completions:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @overload
    def create(self, *, model: str, prompt: Any, stream: Literal[False] = ..., **options: Any) -> Completion: ...
    @overload
    def create(self, *, model: str, prompt: Any, stream: Literal[True], **options: Any) -> Iterator[Completion]: ...
    def create(self, *, model: str, prompt: Any, stream: bool = False, **options: Any) -> Completion | Iterator[Completion]:
        """Continue a prompt or several: text, token ids or lists of either. Raises PlatformError."""
        answers = self._transport.send("completions", {"model": model, "prompt": prompt, "stream": stream, **options})
        return _stream(answers, Completion) if stream else _one(answers, Completion)


class EmbeddingVectors:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, *, model: str, input: Any, **options: Any) -> Embeddings:
        """One vector for each input: text, token ids or lists of either. `options`: dimensions, prompt_name…; over the wire the
        vectors go as base64, and arrive here as floats. Raises PlatformError."""
        (answer,) = self._transport.send("embeddings", {"model": model, "input": input, **options, "encoding_format": "base64"})
        data = [Embedding(item["index"], _floats(item["embedding"])) for item in answer["data"]]
        return Embeddings(answer["model"], data, msgspec.convert(answer["usage"], InputUsage))


class Models:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> list[Model]:
        """The served models."""
        (answer,) = self._transport.send("models.list", {})
        return msgspec.convert(answer["data"], list[Model])

    def retrieve(self, model: str) -> Model:
        """Raises ModelNotFound."""
        return _one(self._transport.send("models.retrieve", {"model": model}), Model)


def _floats(encoded: str) -> list[float]:
    """Little-endian float32, as OpenAI's base64 has it."""
    raw = base64.b64decode(encoded)
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def _one(answers: Answers, kind: type[Answer]) -> Answer:
    (answer,) = answers
    return msgspec.convert(answer, kind)


def _stream(answers: Answers, kind: type[Answer]) -> Iterator[Answer]:
    """The call starts at once, as over the official client: an error before the first chunk is raised by `create`."""
    first = next(answers, None)

    def rest() -> Iterator[Answer]:
        with closing(answers):
            if first is not None:
                yield msgspec.convert(first, kind)
            for answer in answers:
                yield msgspec.convert(answer, kind)

    return rest()
